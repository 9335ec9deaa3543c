package main

import (
	"net"
	"slices"
	"strings"
	"testing"

	ma "github.com/multiformats/go-multiaddr"
)

func TestOnlyAddressesThatHivemindCanReadAreShown(t *testing.T) {
	var all []ma.Multiaddr
	want := []string{"/ip4/192.0.2.1/tcp/1", "/ip6/2001:db8::1/udp/1/quic-v1", "/dns4/example.org/tcp/1/ws"}
	for _, text := range append(slices.Clone(want), "/ip4/192.0.2.1/udp/1/quic-v1/webtransport", "/ip4/192.0.2.1/udp/1/webrtc-direct") {
		all = append(all, ma.StringCast(text))
	}
	before := slices.Clone(all)
	var got []string
	for _, a := range printable(all) {
		got = append(got, a.String())
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %v", got)
	}
	if !slices.EqualFunc(all, before, ma.Multiaddr.Equal) {
		t.Error("the host's own list was changed")
	}
}

func TestAPortInUseIsToldInOneSentence(t *testing.T) {
	taken, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	_, port, _ := net.SplitHostPort(taken.Addr().String())
	o, err := parse("-hostAddrs=/ip4/127.0.0.1/tcp/" + port)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := newDaemon(o, nil); err == nil || !strings.Contains(err.Error(), "another program") || !strings.Contains(err.Error(), port) {
		t.Errorf("got %v", err)
	}
}

func TestControlSocketStaysOnThisComputer(t *testing.T) {
	secret, err := newSecrets(testSecret)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		address string
		secret  *secrets
		says    string
	}{
		{"/ip4/0.0.0.0/tcp/0", secret, "to the network"},
		{"/ip4/127.0.0.1/tcp/0", nil, secretVariable},
		{"/ip4/127.0.0.1/udp/0", secret, "only /unix"},
		{"nonsense", secret, "not an address"},
	} {
		if _, err := listenControl(test.address, test.secret); err == nil || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: %v", test.address, err)
		}
	}
	listener, err := listenControl("/ip4/127.0.0.1/tcp/0", secret)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	if strings.HasSuffix(listener.shown, "/0") || !strings.HasPrefix(listener.shown, "/ip4/127.0.0.1/tcp/") {
		t.Errorf("shown as %s", listener.shown)
	}
}
