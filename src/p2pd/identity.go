package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/libp2p/go-libp2p/core/crypto"
)

// loadIdentity reads a private key file; without a path it makes a fresh Ed25519 key.
func loadIdentity(path string) (crypto.PrivKey, error) {
	if path == "" {
		key, _, err := crypto.GenerateEd25519Key(rand.Reader)
		return key, err
	}
	content, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("the key file %s does not exist", path)
	case err != nil:
		return nil, fmt.Errorf("the key file %s cannot be read: %w", path, err)
	}
	key, err := crypto.UnmarshalPrivateKey(content)
	if err != nil {
		return nil, fmt.Errorf("the key file %s does not hold a libp2p private key: %w", path, err)
	}
	return key, nil
}
