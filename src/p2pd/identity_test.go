package main

import (
	"crypto/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"
)

func TestIdentityOfEveryKeyType(t *testing.T) {
	for name, kind := range map[string]int{"RSA": crypto.RSA, "Ed25519": crypto.Ed25519, "Secp256k1": crypto.Secp256k1, "ECDSA": crypto.ECDSA} {
		t.Run(name, func(t *testing.T) {
			key, public, err := crypto.GenerateKeyPairWithReader(kind, 2048, rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			content, err := crypto.MarshalPrivateKey(key)
			if err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(t.TempDir(), "key")
			if err := os.WriteFile(path, content, 0o400); err != nil {
				t.Fatal(err)
			}
			read, err := loadIdentity(path)
			if err != nil {
				t.Fatal(err)
			}
			got, err := peer.IDFromPrivateKey(read)
			if err != nil {
				t.Fatal(err)
			}
			if want, _ := peer.IDFromPublicKey(public); got != want {
				t.Errorf("got %s, want %s", got, want)
			}
		})
	}
}

func TestIdentityIsFreshWithoutAFile(t *testing.T) {
	ids := map[string]bool{}
	for range 2 {
		key, err := loadIdentity("")
		if err != nil {
			t.Fatal(err)
		}
		id, err := peer.IDFromPrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		ids[id.String()] = true
		if !strings.HasPrefix(id.String(), "12D3KooW") {
			t.Errorf("%s is no Ed25519 identity", id)
		}
	}
	if len(ids) != 2 {
		t.Error("two starts have the same identity")
	}
}

func TestIdentityErrorsNameTheFile(t *testing.T) {
	folder := t.TempDir()
	garbage := filepath.Join(folder, "garbage")
	if err := os.WriteFile(garbage, []byte("not a key"), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, says := range map[string]string{
		filepath.Join(folder, "missing"): "does not exist",
		folder:                           "cannot be read",
		garbage:                          "does not hold a libp2p private key",
	} {
		if _, err := loadIdentity(path); err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", path, err)
		}
	}
}
