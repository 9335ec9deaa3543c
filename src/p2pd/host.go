package main

// The libp2p host: transports, security, limits, relays, DHT.

import (
	"context"
	"fmt"
	"net"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p"
	dht "github.com/libp2p/go-libp2p-kad-dht"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/routing"
	"github.com/libp2p/go-libp2p/p2p/host/autorelay"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	basicconnmgr "github.com/libp2p/go-libp2p/p2p/net/connmgr"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	circuit "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	"github.com/libp2p/go-libp2p/p2p/security/noise"
	tls "github.com/libp2p/go-libp2p/p2p/security/tls"
	quic "github.com/libp2p/go-libp2p/p2p/transport/quic"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"
	"github.com/libp2p/go-libp2p/p2p/transport/websocket"
	"github.com/libp2p/go-libp2p/x/rate"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
	"github.com/pbnjay/memory"
)

// userAgent is what other tools take for a hivemind peer.
const userAgent = "p2pd/0.1"

// newHost makes the host and, if the DHT is on, the DHT that finds its peers.
func newHost(o *options, key crypto.PrivKey) (host.Host, *dht.IpfsDHT, error) {
	for _, a := range o.hostAddrs {
		if err := checkFree(a); err != nil {
			return nil, nil, err
		}
	}
	limits, err := newResourceManager()
	if err != nil {
		return nil, nil, err
	}
	var kad *dht.IpfsDHT
	opts := []libp2p.Option{
		libp2p.Identity(key),
		libp2p.UserAgent(userAgent),
		libp2p.NoListenAddrs, // together with the next line: exactly these, no default list
		libp2p.ListenAddrs(o.hostAddrs...),
		libp2p.NoTransports,
		libp2p.Transport(tcp.NewTCPTransport),
		libp2p.Transport(quic.NewTransport),
		libp2p.Transport(websocket.New),
		libp2p.Muxer(yamux.ID, yamux.DefaultTransport),
		libp2p.ResourceManager(limits),
		libp2p.DisableMetrics(),
		libp2p.SwarmOpts(swarm.WithDialTimeout(o.dialTimeout)),
	}
	// The dialling side chooses the first that both have. TLS is ahead because processors have AES built in.
	if o.tls {
		opts = append(opts, libp2p.Security(tls.ID, tls.New))
	}
	if o.noise {
		opts = append(opts, libp2p.Security(noise.ID, noise.New))
	}
	if o.connManager {
		manager, err := basicconnmgr.NewConnManager(o.connLow, o.connHigh, basicconnmgr.WithGracePeriod(o.connGrace))
		if err != nil {
			return nil, nil, err
		}
		opts = append(opts, libp2p.ConnectionManager(manager))
	}
	if len(o.announceAddrs) > 0 {
		opts = append(opts, libp2p.AddrsFactory(func([]ma.Multiaddr) []ma.Multiaddr { return slices.Clone(o.announceAddrs) }))
	}
	if o.natPortMap {
		opts = append(opts, libp2p.NATPortMap())
	}
	if o.autonat {
		opts = append(opts, libp2p.EnableNATService())
		if o.relay {
			opts = append(opts, libp2p.EnableHolePunching())
		}
	}
	switch {
	case o.public:
		opts = append(opts, libp2p.ForceReachabilityPublic())
	case o.private:
		opts = append(opts, libp2p.ForceReachabilityPrivate())
	}
	if o.relay {
		opts = append(opts, libp2p.EnableRelay())
	} else {
		opts = append(opts, libp2p.DisableRelay())
	}
	if o.autoRelay {
		opts = append(opts, autoRelay(o, &kad))
	}
	if o.dhtOn {
		opts = append(opts, libp2p.Routing(func(h host.Host) (routing.PeerRouting, error) {
			var err error
			kad, err = dht.New(h, dht.Mode(o.dhtMode))
			return kad, err
		}))
	}
	h, err := libp2p.New(opts...)
	if err != nil {
		return nil, nil, fmt.Errorf("the network could not be set up: %s", oneLine(err))
	}
	return h, kad, nil
}

// checkFree finds out if a port is taken. libp2p would not: it shares ports with other listeners, so that two daemons
// on one port would each get some of the connections.
func checkFree(a ma.Multiaddr) error {
	network, target, err := manet.DialArgs(a)
	if err != nil {
		return fmt.Errorf("-hostAddrs: cannot listen on %s: %w", a, err)
	}
	if _, port, err := net.SplitHostPort(target); err != nil || port == "0" {
		return nil
	}
	switch network {
	case "tcp4", "tcp6":
		probe, err := net.Listen(network, target)
		if err == nil {
			err = probe.Close()
		}
		return portError(a, err)
	case "udp4", "udp6":
		probe, err := net.ListenPacket(network, target)
		if err == nil {
			err = probe.Close()
		}
		return portError(a, err)
	}
	return nil
}

// portError keeps only the one error that is certain to be the user's business: a computer without IPv6, say, must be
// able to listen on the other addresses.
func portError(a ma.Multiaddr, err error) error {
	if err != nil && isAddrInUse(err) {
		return listenError("connections of other peers", a.String(), err)
	}
	return nil
}

// listenError says in one sentence why an address cannot be listened on.
func listenError(what, address string, err error) error {
	if isAddrInUse(err) {
		return fmt.Errorf("cannot listen on %s for %s, because another program does: %w", address, what, err)
	}
	return fmt.Errorf("cannot listen on %s for %s: %w", address, what, err)
}

// newResourceManager bounds what peers can take from this computer, generously: hivemind opens hundreds of streams to
// one peer, and a whole site, or several daemons of one computer, can be behind one address. The library's limits per
// address (8 connections, one more every 5 seconds) would keep them out.
func newResourceManager() (network.ResourceManager, error) {
	const (
		conns          = 8192
		connsPerPeer   = 64
		connsPerSubnet = 1024
		connsPerSecond = 64
		streams        = 65536
		streamsPerPeer = 8192
		inTransit      = 8192 // streams and connections that are still being negotiated
	)
	ram := int64(memory.TotalMemory())
	system := max(ram/2, 2<<30)
	bounded := func(conns, streams int, bytes int64) rcmgr.ResourceLimits {
		return rcmgr.ResourceLimits{
			Conns: rcmgr.LimitVal(conns), ConnsInbound: rcmgr.LimitVal(conns), ConnsOutbound: rcmgr.LimitVal(conns),
			Streams: rcmgr.LimitVal(streams), StreamsInbound: rcmgr.LimitVal(streams), StreamsOutbound: rcmgr.LimitVal(streams),
			FD: rcmgr.Unlimited, Memory: rcmgr.LimitVal64(bytes),
		}
	}
	limits := rcmgr.PartialLimitConfig{
		System:      bounded(conns, streams, system),
		Transient:   bounded(inTransit, inTransit, system/2),
		PeerDefault: bounded(connsPerPeer, streamsPerPeer, system/2),
	}.Build(rcmgr.InfiniteLimits)
	// IPv6 networks are handed out as /56 or /64: one site.
	perSubnet := func(prefix int) []rcmgr.ConnLimitPerSubnet {
		return []rcmgr.ConnLimitPerSubnet{{PrefixLength: prefix, ConnCount: connsPerSubnet}}
	}
	perSecond := func(prefix int) []rate.SubnetLimit {
		return []rate.SubnetLimit{{PrefixLength: prefix, Limit: rate.Limit{RPS: connsPerSecond, Burst: connsPerSubnet}}}
	}
	return rcmgr.NewResourceManager(
		rcmgr.NewFixedLimiter(limits),
		rcmgr.WithMetricsDisabled(),
		rcmgr.WithLimitPerSubnet(perSubnet(32), perSubnet(56)),
		rcmgr.WithConnRateLimiters(&rate.Limiter{
			NetworkPrefixLimits: loopback(),
			SubnetRateLimiter: rate.SubnetLimiter{
				IPv4SubnetLimits: perSecond(32), IPv6SubnetLimits: perSecond(56), GracePeriod: time.Minute,
			},
		}),
	)
}

// loopback exempts this computer from the connection rate limit.
func loopback() []rate.PrefixLimit {
	var limits []rate.PrefixLimit
	for _, l := range slices.Concat(rcmgr.DefaultNetworkPrefixLimitV4, rcmgr.DefaultNetworkPrefixLimitV6) {
		limits = append(limits, rate.PrefixLimit{Prefix: l.Network})
	}
	return limits
}

// newRelay lets the host relay for other peers, if the options ask for it; else it returns nil.
func newRelay(o *options, h host.Host) (*circuit.Relay, error) {
	if !o.relay || !o.relayService {
		return nil, nil
	}
	return circuit.New(h, circuit.WithResources(relayResources(o.relayLimits)))
}

// relayResources gives every reservation the limits of the command line from the start.
func relayResources(l relayLimits) circuit.Resources {
	r := circuit.DefaultResources()
	r.Limit = &circuit.RelayLimit{Duration: l.duration, Data: l.data}
	r.MaxCircuits = l.circuits
	r.MaxReservations = l.reservations
	r.MaxReservationsPerIP = l.reservations
	r.MaxReservationsPerASN = l.reservations
	r.BufferSize = l.buffer
	return r
}

// autoRelay finds relays among the trusted ones first, then among the DHT's peers. A private swarm has few candidates:
// the first that works is taken at once.
func autoRelay(o *options, kad **dht.IpfsDHT) libp2p.Option {
	tuning := []autorelay.Option{
		autorelay.WithMinCandidates(1), autorelay.WithBootDelay(0), autorelay.WithBackoff(time.Minute),
	}
	if !o.relaySearch {
		return libp2p.EnableAutoRelayWithStaticRelays(o.trustedRelays, tuning...)
	}
	source := func(ctx context.Context, count int) <-chan peer.AddrInfo {
		found := make(chan peer.AddrInfo)
		go func() {
			defer close(found)
			offer := func(p peer.AddrInfo) bool {
				select {
				case found <- p:
					count--
				case <-ctx.Done():
					return false
				}
				return count > 0
			}
			for _, p := range o.trustedRelays {
				if !offer(p) {
					return
				}
			}
			if *kad == nil {
				return // called while the host is still being made
			}
			own := (*kad).Host()
			ids, err := (*kad).GetClosestPeers(ctx, string(own.ID()))
			if err != nil {
				log.Debugw("no relay candidates from the DHT yet", "error", err)
				return
			}
			for _, id := range ids {
				if addrs := own.Peerstore().Addrs(id); len(addrs) > 0 && !offer(peer.AddrInfo{ID: id, Addrs: addrs}) {
					return
				}
			}
		}()
		return found
	}
	return libp2p.EnableAutoRelayWithPeerSource(source, append(tuning, autorelay.WithMinInterval(15*time.Second))...)
}

// printable leaves out addresses that the Multiaddr class of hivemind cannot parse.
func printable(addrs []ma.Multiaddr) []ma.Multiaddr {
	known := []int{
		ma.P_IP4, ma.P_IP6, ma.P_IP6ZONE, ma.P_TCP, ma.P_UDP, ma.P_DNS, ma.P_DNS4, ma.P_DNS6, ma.P_DNSADDR, ma.P_P2P,
		ma.P_QUIC, ma.P_QUIC_V1, ma.P_HTTP, ma.P_HTTPS, ma.P_TLS, ma.P_WS, ma.P_WSS, ma.P_ONION, ma.P_ONION3, ma.P_CIRCUIT,
	}
	return slices.DeleteFunc(slices.Clone(addrs), func(a ma.Multiaddr) bool {
		return slices.ContainsFunc(a.Protocols(), func(p ma.Protocol) bool { return !slices.Contains(known, p.Code) })
	})
}

// holdTag marks peers with calls or streams under way.
const holdTag = "p2pd"

// isHeld tells if a peer has calls or streams under way.
func (d *daemon) isHeld(id peer.ID) bool {
	d.holding.Lock()
	defer d.holding.Unlock()
	return d.held[id] > 0
}

// hold keeps the connection manager from closing the connection to a stream's peer. The result undoes it.
func (d *daemon) hold(s network.Stream) func() {
	id := s.Conn().RemotePeer()
	d.holding.Lock()
	defer d.holding.Unlock()
	if d.held[id]++; d.held[id] == 1 {
		d.host.ConnManager().Protect(id, holdTag)
	}
	return func() {
		d.holding.Lock()
		defer d.holding.Unlock()
		if d.held[id]--; d.held[id] == 0 {
			delete(d.held, id)
			d.host.ConnManager().Unprotect(id, holdTag)
		}
	}
}
