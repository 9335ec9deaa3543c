package main

// The secret that stands in for file permissions where the control socket is a TCP port. README.md gives the exact
// bytes.

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"
)

const (
	secretVariable = "PETALS_WIN_P2PD_SECRET"
	secretLen      = 64 // hexadecimal characters: 256 bits
	secretTimeout  = 10 * time.Second
	// handlerLabel separates what the daemon shows to stream handlers from what clients show to the daemon: whoever
	// takes over the port of a dead handler learns nothing that opens the control socket.
	handlerLabel = "petals-win p2pd stream handler\n"
)

var errNoSecret = errors.New("the connection did not open with the secret")

// secrets holds what opens a TCP connection: inbound from clients to the daemon, outbound from it to stream handlers.
type secrets struct {
	inbound  []byte
	outbound []byte
}

// takeSecret reads the secret and removes it from the environment, so that no child process inherits it. Without one
// it returns nil.
func takeSecret() (*secrets, error) {
	text, found := os.LookupEnv(secretVariable)
	if !found {
		return nil, nil
	}
	if err := os.Unsetenv(secretVariable); err != nil {
		return nil, err
	}
	return newSecrets(text)
}

func newSecrets(text string) (*secrets, error) {
	_, err := hex.DecodeString(text)
	if err != nil || len(text) != secretLen || strings.ToLower(text) != text {
		return nil, fmt.Errorf("%s must hold %d lower-case hexadecimal characters", secretVariable, secretLen)
	}
	outbound := sha256.Sum256([]byte(handlerLabel + text))
	return &secrets{inbound: []byte(text), outbound: []byte(hex.EncodeToString(outbound[:]))}, nil
}

// check reads the opening of a client's connection and refuses it unless it is the secret.
func (s *secrets) check(conn net.Conn) error {
	if err := conn.SetReadDeadline(time.Now().Add(secretTimeout)); err != nil {
		return err
	}
	got := make([]byte, secretLen)
	if _, err := io.ReadFull(conn, got); err != nil {
		return fmt.Errorf("%w: %v", errNoSecret, err)
	}
	if subtle.ConstantTimeCompare(got, s.inbound) != 1 {
		return errNoSecret
	}
	return conn.SetReadDeadline(time.Time{})
}

// show opens a connection to a stream handler.
func (s *secrets) show(conn net.Conn) error {
	_, err := conn.Write(s.outbound)
	return err
}
