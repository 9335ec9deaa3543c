package main

// Direct connections in place of relayed ones.

import (
	"context"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/protocol/holepunch"
	ma "github.com/multiformats/go-multiaddr"
)

const (
	renewInterval = 5 * time.Second
	renewTimeout  = 30 * time.Second
)

// punchLater gives peers a second chance that met too early. libp2p punches holes when a relayed connection comes in, and
// only then; if one of the two has not learnt its public address yet, as is usual right after its start, the connection
// stays relayed. So, once this daemon has learnt its own, its relayed connections are made anew.
func (d *daemon) punchLater() error {
	changes, err := d.host.EventBus().Subscribe(new(event.EvtLocalProtocolsUpdated))
	if err != nil {
		return err
	}
	go func() {
		defer changes.Close()
		for {
			select {
			case <-d.ctx.Done():
				return
			case change := <-changes.Out():
				if slices.Contains(change.(event.EvtLocalProtocolsUpdated).Added, holepunch.Protocol) {
					d.renewRelayed()
					return
				}
			}
		}
	}()
	return nil
}

// renewRelayed makes the present relayed connections anew, each when no call or stream uses it.
func (d *daemon) renewRelayed() {
	waiting := slices.DeleteFunc(d.host.Network().Conns(), func(conn network.Conn) bool {
		_, err := conn.RemoteMultiaddr().ValueForProtocol(ma.P_CIRCUIT)
		return err != nil
	})
	for len(waiting) > 0 {
		waiting = slices.DeleteFunc(waiting, func(conn network.Conn) bool {
			if d.isHeld(conn.RemotePeer()) {
				return conn.IsClosed()
			}
			d.renew(conn)
			return true
		})
		select {
		case <-d.ctx.Done():
			return
		case <-time.After(renewInterval):
		}
	}
}

func (d *daemon) renew(conn network.Conn) {
	if err := conn.Close(); err != nil {
		log.Debugw("closing a relayed connection", "error", err)
	}
	ctx, cancel := context.WithTimeout(network.WithAllowLimitedConn(d.ctx, "p2pd"), renewTimeout)
	defer cancel()
	if err := d.host.Connect(ctx, peer.AddrInfo{ID: conn.RemotePeer()}); err != nil {
		log.Debugw("cannot connect again to a relayed peer", "peer", conn.RemotePeer(), "error", oneLine(err))
	}
}
