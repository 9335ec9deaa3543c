package main

import (
	"context"
	"net"
	"sync"
	"time"

	dht "github.com/libp2p/go-libp2p-kad-dht"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/discovery/mdns"
	circuit "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
)

// daemon is a running p2pd: one libp2p host, one control socket, any number of clients.
type daemon struct {
	opts   *options
	secret *secrets // nil without one
	host   host.Host
	dht    *dht.IpfsDHT   // nil when off
	relay  *circuit.Relay // nil when off
	life   *life
	ctx    context.Context // ends when the daemon stops
	cancel context.CancelFunc

	listener *controlListener
	unary    rotations[*persistentConn]
	streams  rotations[handlerAddr]

	holding sync.Mutex
	held    map[peer.ID]int // calls and streams under way

	tracking sync.Mutex
	conns    map[net.Conn]struct{} // local sockets; nil once stopped
	serving  sync.WaitGroup
}

// newDaemon makes the host and opens the control socket. Clients may connect from here on; serve answers them.
func newDaemon(o *options, secret *secrets) (*daemon, error) {
	key, err := loadIdentity(o.identity)
	if err != nil {
		return nil, err
	}
	d := &daemon{opts: o, secret: secret, life: newLife(), held: make(map[peer.ID]int), conns: make(map[net.Conn]struct{})}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	if d.host, d.dht, err = newHost(o, key); err != nil {
		d.cancel()
		return nil, err
	}
	if err := d.punchLater(); err != nil {
		d.stop()
		return nil, err
	}
	if d.relay, err = newRelay(o, d.host); err != nil {
		d.stop()
		return nil, err
	}
	if d.listener, err = listenControl(o.listen, secret); err != nil {
		d.stop()
		return nil, err
	}
	return d, nil
}

// join connects to the swarm as far as the options ask for it.
func (d *daemon) join() error {
	if d.opts.mdns != "" {
		if err := mdns.NewMdnsService(d.host, mdnsService(d.opts.mdns), neighbours{d}).Start(); err != nil {
			return err
		}
	}
	if d.opts.bootstrap {
		return d.joinSwarm()
	}
	return nil
}

// serve answers clients until stop.
func (d *daemon) serve() {
	d.life.expectClient(d.opts.idleTimeout)
	d.serveControl(d.listener)
}

// stop ends everything: the control socket first, then clients, then the host.
func (d *daemon) stop() {
	d.cancel()
	if d.listener != nil {
		d.listener.Close()
	}
	d.tracking.Lock()
	open := d.conns
	d.conns = nil
	d.tracking.Unlock()
	for conn := range open {
		conn.Close()
	}
	if d.relay != nil {
		if err := d.relay.Close(); err != nil {
			log.Debugw("closing the relay", "error", err)
		}
	}
	if d.dht != nil {
		if err := d.dht.Close(); err != nil {
			log.Debugw("closing the DHT", "error", err)
		}
	}
	if err := d.host.Close(); err != nil {
		log.Debugw("closing the host", "error", err)
	}
	d.serving.Wait()
}

// track notes a local socket to be closed by stop; it refuses when that has happened.
func (d *daemon) track(conn net.Conn) bool {
	d.tracking.Lock()
	defer d.tracking.Unlock()
	if d.conns == nil {
		return false
	}
	d.conns[conn] = struct{}{}
	d.serving.Add(1)
	return true
}

// untrack closes a tracked socket.
func (d *daemon) untrack(conn net.Conn) {
	conn.Close()
	d.tracking.Lock()
	delete(d.conns, conn)
	d.tracking.Unlock()
	d.serving.Done()
}

// neighbours connects to peers found in the local network.
type neighbours struct{ d *daemon }

const mdnsConnectTimeout = 30 * time.Second

func (n neighbours) HandlePeerFound(p peer.AddrInfo) {
	if p.ID == n.d.host.ID() {
		return
	}
	ctx, cancel := context.WithTimeout(n.d.ctx, mdnsConnectTimeout)
	defer cancel()
	if err := n.d.host.Connect(ctx, p); err != nil {
		log.Debugw("cannot connect to a peer found by mDNS", "peer", p.ID, "error", oneLine(err))
	}
}
