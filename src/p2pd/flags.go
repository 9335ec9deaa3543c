package main

// The command line. Every flag of the protocol's specification is defined, also those without effect, because an
// undefined one ends the program.

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"strings"
	"time"

	dht "github.com/libp2p/go-libp2p-kad-dht"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
)

// options is what the command line asks for, checked.
type options struct {
	listen        string
	quiet         bool
	identity      string
	bootstrap     bool
	bootstrapFrom []peer.AddrInfo
	ownBootstrap  bool // bootstrapFrom comes from the command line, not from the public list
	dhtMode       dht.ModeOpt
	dhtOn         bool
	hostAddrs     []ma.Multiaddr
	announceAddrs []ma.Multiaddr
	connManager   bool
	connLow       int
	connHigh      int
	connGrace     time.Duration
	natPortMap    bool
	relay         bool
	relayService  bool
	relayLimits   relayLimits
	autoRelay     bool
	relaySearch   bool
	trustedRelays []peer.AddrInfo
	autonat       bool
	public        bool
	private       bool
	noise         bool
	tls           bool
	idleTimeout   time.Duration
	dialTimeout   time.Duration
	maxMessage    int
	mdns          string
	showVersion   bool
}

type relayLimits struct {
	circuits     int
	reservations int
	buffer       int
	data         int64
	duration     time.Duration
}

// usageError is a mistake in the command line's syntax.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// parseFlags reads the command line. What the flag package has to say about it goes to usage.
func parseFlags(args []string, usage io.Writer) (*options, error) {
	o := &options{}
	fs := flag.NewFlagSet("p2pd", flag.ContinueOnError)
	fs.SetOutput(usage)

	fs.StringVar(&o.listen, "listen", "/unix/tmp/p2pd.sock", "control address: /unix/PATH or /ip4/127.0.0.1/tcp/PORT")
	fs.BoolVar(&o.quiet, "q", false, "print nothing on standard output")
	fs.StringVar(&o.identity, "id", "", "private key file; a fresh key if empty")
	fs.BoolVar(&o.bootstrap, "b", false, "connect to the bootstrap peers")
	bootstrapPeers := fs.String("bootstrapPeers", "", "comma-separated addresses ending in /p2p/ID; the public IPFS peers if empty")
	dhtAuto := fs.Bool("dht", false, "take part in the DHT, as a server once publicly reachable")
	dhtClient := fs.Bool("dhtClient", false, "take part in the DHT as a client")
	dhtServer := fs.Bool("dhtServer", false, "take part in the DHT as a server")
	hostAddrs := fs.String("hostAddrs", "", "comma-separated addresses to listen on; none if empty")
	announceAddrs := fs.String("announceAddrs", "", "comma-separated addresses to announce in place of the found ones")
	noListen := fs.Bool("noListenAddrs", false, "listen on nothing, whatever hostAddrs says")
	fs.BoolVar(&o.connManager, "connManager", false, "use the connection manager with the limits below")
	fs.IntVar(&o.connLow, "connLo", 256, "connections kept when the connection manager trims")
	fs.IntVar(&o.connHigh, "connHi", 512, "connections above which the connection manager trims")
	fs.DurationVar(&o.connGrace, "connGrace", 2*time.Minute, "age below which a connection is not trimmed")
	fs.BoolVar(&o.natPortMap, "natPortMap", false, "ask the router for port mappings (UPnP, NAT-PMP)")
	fs.BoolVar(&o.relay, "relay", true, "use circuit relays, and be one if relayService is on")
	fs.BoolVar(&o.relayService, "relayService", true, "relay for other peers")
	fs.IntVar(&o.relayLimits.circuits, "relayMaxCircuits", 16, "relayed connections for each peer")
	fs.IntVar(&o.relayLimits.reservations, "relayMaxReservations", 128, "peers that may be relayed to")
	fs.IntVar(&o.relayLimits.buffer, "relayBufferSize", 64<<10, "bytes of buffer for each direction of a relayed connection")
	fs.Int64Var(&o.relayLimits.data, "relayDataLimit", 4<<30, "bytes in each direction of a relayed connection")
	fs.DurationVar(&o.relayLimits.duration, "relayTimeLimit", 30*time.Minute, "life of a relayed connection")
	fs.BoolVar(&o.autoRelay, "autoRelay", false, "find relays when not publicly reachable")
	fs.BoolVar(&o.relaySearch, "relayDiscovery", true, "with autoRelay: look for relays in the DHT, not only in trustedRelays")
	trustedRelays := fs.String("trustedRelays", "", "with autoRelay: comma-separated addresses of relays to prefer")
	fs.BoolVar(&o.autonat, "autonat", false, "help other peers to find out if they are reachable, and punch holes")
	fs.BoolVar(&o.public, "forceReachabilityPublic", false, "assume that this peer can be reached")
	fs.BoolVar(&o.private, "forceReachabilityPrivate", false, "assume that this peer cannot be reached")
	fs.BoolVar(&o.noise, "noise", true, "offer Noise")
	fs.BoolVar(&o.tls, "tls", true, "offer TLS 1.3")
	muxer := fs.String("muxer", "yamux", "stream multiplexer; there is but yamux")
	fs.DurationVar(&o.idleTimeout, "idleTimeout", 0, "end if no persistent connection is opened in time; 0 waits for ever")
	fs.DurationVar(&o.dialTimeout, "dialTimeout", 15*time.Second, "time for dialling one address of a peer")
	fs.IntVar(&o.maxMessage, "persistentConnMaxMsgSize", 4<<20, "largest message, in bytes")
	fs.StringVar(&o.mdns, "mdns", "", "name of a swarm: connect to its peers in the local network, found by mDNS; off if empty")
	fs.BoolVar(&o.showVersion, "version", false, "print the version and exit")

	const noEffect = "accepted, without effect"
	fs.Bool("quic", true, noEffect)
	fs.Bool("relayActive", false, noEffect)
	fs.Bool("relayHop", false, noEffect)
	fs.Int("relayHopLimit", 0, noEffect)
	fs.String("pubsubRouter", "gossipsub", noEffect)
	fs.Bool("pubsubSign", true, noEffect)
	fs.Bool("pubsubSignStrict", true, noEffect)
	fs.Duration("gossipsubHeartbeatInterval", 0, noEffect)
	fs.Duration("gossipsubHeartbeatInitialDelay", 0, noEffect)
	fs.Int("pprofPort", 0, noEffect)

	const unsupported = "not supported"
	pubsub := fs.Bool("pubsub", false, unsupported)
	pprof := fs.Bool("pprof", false, unsupported)
	metrics := fs.String("metricsAddr", "", unsupported)
	configFile := fs.String("f", "", unsupported)
	configInput := fs.Bool("i", false, unsupported)

	if err := fs.Parse(args); err != nil {
		return nil, usageError{err}
	}
	if fs.NArg() > 0 {
		return nil, usageError{fmt.Errorf("unexpected argument %q: every option is written as -name=value", fs.Arg(0))}
	}
	for name, on := range map[string]bool{
		"pubsub": *pubsub, "pprof": *pprof, "metricsAddr": *metrics != "", "f": *configFile != "", "i": *configInput,
	} {
		if on {
			return nil, fmt.Errorf("-%s is not supported by this daemon", name)
		}
	}
	if *muxer != "yamux" {
		return nil, fmt.Errorf("-muxer=%s is not supported; there is but yamux", *muxer)
	}

	switch {
	case *dhtAuto:
		o.dhtOn, o.dhtMode = true, dht.ModeAuto
	case *dhtClient:
		o.dhtOn, o.dhtMode = true, dht.ModeClient
	case *dhtServer:
		o.dhtOn, o.dhtMode = true, dht.ModeServer
	}

	var err error
	if o.hostAddrs, err = parseAddrs("hostAddrs", *hostAddrs); err != nil {
		return nil, err
	}
	if *noListen {
		o.hostAddrs = nil
	}
	if o.announceAddrs, err = parseAddrs("announceAddrs", *announceAddrs); err != nil {
		return nil, err
	}
	if o.trustedRelays, err = parsePeers("trustedRelays", *trustedRelays); err != nil {
		return nil, err
	}
	if o.bootstrapFrom, err = parsePeers("bootstrapPeers", *bootstrapPeers); err != nil {
		return nil, err
	}
	o.ownBootstrap = len(o.bootstrapFrom) > 0
	if o.bootstrap && !o.ownBootstrap {
		o.bootstrapFrom = dht.GetDefaultBootstrapPeerAddrInfos()
	}
	return o, o.check()
}

// check refuses combinations that cannot work.
func (o *options) check() error {
	switch {
	case !o.noise && !o.tls:
		return errors.New("-noise=0 and -tls=0 leave no way to secure a connection; turn one of them on")
	case o.public && o.private:
		return errors.New("-forceReachabilityPublic and -forceReachabilityPrivate exclude each other")
	case o.autoRelay && !o.relay:
		return errors.New("-autoRelay=1 needs -relay=1")
	case o.autoRelay && !o.dhtOn:
		return errors.New("-autoRelay=1 needs the DHT: add -dht=1, -dhtClient=1 or -dhtServer=1")
	case o.autoRelay && !o.relaySearch && len(o.trustedRelays) == 0:
		return errors.New("-autoRelay=1 with -relayDiscovery=0 needs -trustedRelays")
	case len(o.trustedRelays) > 0 && !o.autoRelay:
		return errors.New("-trustedRelays has a meaning only with -autoRelay=1")
	case o.maxMessage <= 0 || o.maxMessage > 1<<30:
		return errors.New("-persistentConnMaxMsgSize must be positive, and at most 1073741824 (1 GiB)")
	case o.dialTimeout <= 0:
		return errors.New("-dialTimeout must be positive")
	case o.idleTimeout < 0:
		return errors.New("-idleTimeout must not be negative")
	case o.connManager && o.connLow > o.connHigh:
		return errors.New("-connLo must not exceed -connHi")
	}
	return nil
}

func splitList(list string) []string {
	return strings.FieldsFunc(list, func(r rune) bool { return r == ',' || r == ' ' })
}

func parseAddrs(name, list string) ([]ma.Multiaddr, error) {
	var addrs []ma.Multiaddr
	for _, text := range splitList(list) {
		a, err := ma.NewMultiaddr(text)
		if err != nil {
			return nil, fmt.Errorf("-%s: %q is not an address: %w", name, text, err)
		}
		addrs = append(addrs, a)
	}
	return addrs, nil
}

func parsePeers(name, list string) ([]peer.AddrInfo, error) {
	addrs, err := parseAddrs(name, list)
	if err != nil {
		return nil, err
	}
	peers, err := peer.AddrInfosFromP2pAddrs(addrs...)
	if err != nil {
		return nil, fmt.Errorf("-%s: every address must end in /p2p/PEER-ID: %w", name, err)
	}
	return peers, nil
}
