package main

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
)

var testSecret = strings.Repeat("0123456789abcdef", 4)

func TestSecretForm(t *testing.T) {
	for _, wrong := range []string{"", "abc", testSecret[1:], testSecret + "0", strings.ToUpper(testSecret), strings.Repeat("g", secretLen)} {
		if _, err := newSecrets(wrong); err == nil {
			t.Errorf("%q was accepted", wrong)
		} else if wrong != "" && strings.Contains(err.Error(), wrong) {
			t.Errorf("the message tells the secret: %v", err)
		}
	}
	s, err := newSecrets(testSecret)
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256([]byte("petals-win p2pd stream handler\n" + testSecret))
	if string(s.inbound) != testSecret || string(s.outbound) != hex.EncodeToString(digest[:]) {
		t.Error("the bytes are not those of the README")
	}
}

func TestSecretLeavesTheEnvironment(t *testing.T) {
	t.Setenv(secretVariable, testSecret)
	if s, err := takeSecret(); err != nil || s == nil {
		t.Fatalf("%v, %v", s, err)
	}
	if _, there := os.LookupEnv(secretVariable); there {
		t.Error("a child process would inherit the secret")
	}
	if s, err := takeSecret(); err != nil || s != nil {
		t.Errorf("without a secret: %v, %v", s, err)
	}
}

func TestSecretIsChecked(t *testing.T) {
	s, err := newSecrets(testSecret)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name, opening string
		want          error
	}{
		{"right", testSecret + "more", nil},
		{"wrong", strings.Repeat("f", secretLen), errNoSecret},
		{"one bit", testSecret[:secretLen-1] + "e", errNoSecret},
		{"cut off", testSecret[:10], errNoSecret},
		{"nothing", "", errNoSecret},
		{"what the daemon shows to handlers", string(s.outbound), errNoSecret},
	} {
		here, there := net.Pipe()
		go func() {
			_, _ = io.WriteString(there, test.opening) // the check may not read all of it
			there.Close()
		}()
		if err := s.check(here); !errors.Is(err, test.want) {
			t.Errorf("%s: %v", test.name, err)
		}
		if test.want == nil {
			if rest, err := io.ReadAll(here); err != nil || string(rest) != "more" {
				t.Errorf("%s: what follows is %q, %v", test.name, rest, err)
			}
		}
		here.Close()
	}
}
