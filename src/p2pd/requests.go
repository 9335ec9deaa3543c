package main

// The plain requests of the control socket: one request, one reply (or, for a look-up, a few messages).

import (
	"errors"
	"fmt"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
)

var errMalformed = errors.New("malformed request: its parameters are missing")

// outcome says what a connection turns into after the reply; the zero value: nothing, more requests may follow.
type outcome struct {
	persistent bool
	stream     network.Stream
}

func (d *daemon) handle(r *request) ([][]byte, outcome) {
	switch r.kind {
	case reqStreamOpen:
		reply, stream, err := d.openForClient(r.streamOpen)
		if err != nil {
			return [][]byte{errorResponse(err)}, outcome{}
		}
		return [][]byte{reply}, outcome{stream: stream}
	case reqPersistentUpgrade:
		return [][]byte{okResponse()}, outcome{persistent: true}
	case reqDHT:
		replies, err := d.lookUp(r.dht)
		if err != nil {
			return [][]byte{errorResponse(err)}, outcome{}
		}
		return replies, outcome{}
	}
	reply, err := d.answer(r)
	if err != nil {
		reply = errorResponse(err)
	}
	return [][]byte{reply}, outcome{}
}

// answer serves the requests that have one reply and leave the connection as it is.
func (d *daemon) answer(r *request) ([]byte, error) {
	switch r.kind {
	case reqIdentify:
		return appendBytes(okResponse(), 4, encodePeerAddrs(d.identity())), nil
	case reqConnect:
		return okResponse(), d.connect(r.connect)
	case reqDisconnect:
		return okResponse(), d.disconnect(r.disconnect)
	case reqListPeers:
		reply := okResponse()
		for _, conn := range d.host.Network().Conns() {
			remote := peerAddrs{id: []byte(conn.RemotePeer()), addrs: [][]byte{conn.RemoteMultiaddr().Bytes()}}
			reply = appendBytes(reply, 6, encodePeerAddrs(remote))
		}
		return reply, nil
	case reqStreamHandler:
		return okResponse(), d.addStreamHandler(r.streamHandler)
	case reqRemoveStreamHandler:
		return okResponse(), d.removeStreamHandler(r.removeStreamHandler)
	case reqConnManager:
		return nil, errors.New("connection manager requests are not supported by this daemon")
	case reqPubsub:
		return nil, errors.New("pubsub is not supported by this daemon")
	}
	return nil, fmt.Errorf("request type %d is not supported by this daemon", r.kind)
}

func (d *daemon) identity() peerAddrs {
	p := peerAddrs{id: []byte(d.host.ID())}
	for _, a := range printable(d.host.Addrs()) {
		p.addrs = append(p.addrs, a.Bytes())
	}
	return p
}

func (d *daemon) connect(r *peerRequest) error {
	if r == nil {
		return errMalformed
	}
	id, err := peer.IDFromBytes(r.peer)
	if err != nil {
		return fmt.Errorf("not a peer ID: %w", err)
	}
	target := peer.AddrInfo{ID: id}
	for _, raw := range r.addrs {
		a, err := ma.NewMultiaddrBytes(raw)
		if err != nil {
			return fmt.Errorf("not an address: %w", err)
		}
		target.Addrs = append(target.Addrs, a)
	}
	ctx, cancel := d.deadline(r.timeout)
	defer cancel()
	return d.host.Connect(network.WithAllowLimitedConn(ctx, "p2pd"), target)
}

func (d *daemon) disconnect(r *peerRequest) error {
	if r == nil {
		return errMalformed
	}
	id, err := peer.IDFromBytes(r.peer)
	if err != nil {
		return fmt.Errorf("not a peer ID: %w", err)
	}
	return d.host.Network().ClosePeer(id)
}

// lookUp serves FIND_PEER and GET_CLOSEST_PEERS. The second replies with several messages, of which only the first is
// wrapped in a Response.
func (d *daemon) lookUp(r *dhtRequest) ([][]byte, error) {
	if r == nil {
		return nil, errMalformed
	}
	if d.dht == nil {
		return nil, errors.New("the DHT is off; start the daemon with -dht, -dhtClient or -dhtServer")
	}
	ctx, cancel := d.deadline(r.timeout)
	defer cancel()
	switch r.kind {
	case dhtFindPeer:
		id, err := peer.IDFromBytes(r.peer)
		if err != nil {
			return nil, fmt.Errorf("not a peer ID: %w", err)
		}
		found, err := d.dht.FindPeer(ctx, id)
		if err != nil {
			return nil, err
		}
		p := peerAddrs{id: []byte(found.ID)}
		for _, a := range printable(found.Addrs) {
			p.addrs = append(p.addrs, a.Bytes())
		}
		return [][]byte{appendBytes(okResponse(), 5, encodeDHTResponse(dhtValue, &p, nil))}, nil
	case dhtGetClosestPeers:
		ids, err := d.dht.GetClosestPeers(ctx, string(r.key))
		if err != nil {
			return nil, err
		}
		replies := [][]byte{appendBytes(okResponse(), 5, encodeDHTResponse(dhtBegin, nil, nil))}
		for _, id := range ids {
			replies = append(replies, encodeDHTResponse(dhtValue, nil, []byte(id)))
		}
		return append(replies, encodeDHTResponse(dhtEnd, nil, nil)), nil
	}
	return nil, fmt.Errorf("DHT request type %d is not supported by this daemon", r.kind)
}
