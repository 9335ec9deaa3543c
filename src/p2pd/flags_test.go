package main

import (
	"errors"
	"flag"
	"io"
	"strings"
	"testing"
	"time"

	dht "github.com/libp2p/go-libp2p-kad-dht"
)

const somePeer = "/ip4/192.0.2.1/tcp/4001/p2p/12D3KooWD3bfmNbuuuVCYwkjnFt3ukm3qaB3hDED3peHHXawvRAi"

func parse(args ...string) (*options, error) { return parseFlags(args, io.Discard) }

func TestFlagsOfHivemind(t *testing.T) {
	o, err := parse("-autoRelay=0", "-autonat=1", "-b=0", "-connManager=1", "-idleTimeout=30.0s", "-listen=/unix/tmp/x.sock",
		"-natPortMap=1", "-relay=1", "-relayHopLimit=0", "-tls=1", "-persistentConnMaxMsgSize=4194304", "-dhtServer=1",
		"-hostAddrs=/ip4/127.0.0.1/tcp/0,/ip6/::1/udp/0/quic-v1")
	if err != nil {
		t.Fatal(err)
	}
	if o.listen != "/unix/tmp/x.sock" || !o.autonat || o.autoRelay || o.bootstrap || !o.connManager || !o.natPortMap || !o.relay ||
		!o.tls || !o.noise || o.idleTimeout != 30*time.Second || o.maxMessage != 4<<20 || !o.dhtOn || o.dhtMode != dht.ModeServer ||
		len(o.hostAddrs) != 2 {
		t.Errorf("%+v", o)
	}
}

func TestFlagForms(t *testing.T) {
	for _, on := range []string{"-q", "--q", "-q=1", "--q=true", "-q=t"} {
		if o, err := parse(on); err != nil || !o.quiet {
			t.Errorf("%s: %v", on, err)
		}
	}
	for _, off := range []string{"-relay=0", "-relay=false", "--relay=f"} {
		if o, err := parse(off); err != nil || o.relay {
			t.Errorf("%s: %v", off, err)
		}
	}
}

// Every flag that upstream's daemon defines must parse, also those that do nothing here.
func TestFlagsWithoutEffect(t *testing.T) {
	_, err := parse("-quic=1", "-relayActive=1", "-relayHop=1", "-relayHopLimit=3", "-pubsub=0", "-pubsubRouter=floodsub",
		"-pubsubSign=1", "-pubsubSignStrict=0", "-gossipsubHeartbeatInterval=1s", "-gossipsubHeartbeatInitialDelay=1s",
		"-metricsAddr=", "-pprof=0", "-pprofPort=1", "-f=", "-i=0", "-muxer=yamux", "-noise=1", "-connLo=1", "-connHi=2",
		"-connGrace=1s", "-relayService=1", "-relayMaxCircuits=1", "-relayMaxReservations=1", "-relayBufferSize=1",
		"-relayDataLimit=1", "-relayTimeLimit=1s", "-relayDiscovery=1", "-bootstrapPeers=", "-announceAddrs=", "-noListenAddrs=0")
	if err != nil {
		t.Error(err)
	}
}

func TestFlagDefaults(t *testing.T) {
	o, err := parse()
	if err != nil {
		t.Fatal(err)
	}
	if o.dhtOn || len(o.hostAddrs) != 0 || o.idleTimeout != 0 || o.mdns != "" || o.connManager || o.autonat || o.bootstrap {
		t.Errorf("something is on unasked: %+v", o)
	}
	if o.relayLimits.data != 4<<30 || o.relayLimits.duration != 30*time.Minute {
		t.Errorf("relay limits: %+v", o.relayLimits)
	}
}

func TestFlagMeanings(t *testing.T) {
	for mode, want := range map[string]dht.ModeOpt{"-dht=1": dht.ModeAuto, "-dhtClient=1": dht.ModeClient, "-dhtServer=1": dht.ModeServer} {
		if o, err := parse(mode); err != nil || !o.dhtOn || o.dhtMode != want {
			t.Errorf("%s: %v", mode, err)
		}
	}
	if o, err := parse("-noListenAddrs=1", "-hostAddrs=/ip4/0.0.0.0/tcp/1"); err != nil || len(o.hostAddrs) != 0 {
		t.Errorf("noListenAddrs: %+v, %v", o, err)
	}
	if o, err := parse("-b=1", "-bootstrapPeers="+somePeer); err != nil || !o.ownBootstrap || len(o.bootstrapFrom) != 1 {
		t.Errorf("bootstrapPeers: %+v, %v", o, err)
	}
	if o, err := parse("-b=1"); err != nil || o.ownBootstrap || len(o.bootstrapFrom) < 2 {
		t.Errorf("public bootstrap peers: %+v, %v", o, err)
	}
}

func TestFlagMistakes(t *testing.T) {
	for _, test := range []struct{ args, says string }{
		{"-hostAddrs=1.2.3.4", "-hostAddrs"},
		{"-announceAddrs=/ip4/1.2.3/tcp/1", "-announceAddrs"},
		{"-bootstrapPeers=/ip4/1.2.3.4/tcp/1", "/p2p/PEER-ID"},
		{"-trustedRelays=" + somePeer, "-autoRelay=1"},
		{"-autoRelay=1 -relay=0 -dht=1", "-relay=1"},
		{"-autoRelay=1", "DHT"},
		{"-autoRelay=1 -dht=1 -relayDiscovery=0", "-trustedRelays"},
		{"-noise=0 -tls=0", "-noise=0"},
		{"-forceReachabilityPublic=1 -forceReachabilityPrivate=1", "exclude"},
		{"-persistentConnMaxMsgSize=0", "-persistentConnMaxMsgSize"},
		{"-persistentConnMaxMsgSize=9223372036854775807", "1 GiB"},
		{"-idleTimeout=-1s", "-idleTimeout"},
		{"-dialTimeout=0s", "-dialTimeout"},
		{"-connManager=1 -connLo=3 -connHi=2", "-connLo"},
		{"-muxer=mplex", "-muxer=mplex"},
		{"-pubsub=1", "-pubsub"},
		{"-f=config", "-f"},
	} {
		_, err := parse(strings.Fields(test.args)...)
		var usage usageError
		if err == nil || errors.As(err, &usage) || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: %v", test.args, err)
		}
	}
	for _, args := range []string{"-nonsense=1", "-b=perhaps", "-idleTimeout=soon", "word"} {
		_, err := parse(args)
		var usage usageError
		if !errors.As(err, &usage) {
			t.Errorf("%s: %v is no usage error", args, err)
		}
	}
	if _, err := parse("-help"); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("-help: %v", err)
	}
}
