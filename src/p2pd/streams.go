package main

// Raw streams: opened for a client, or handed to the address that a client listens on.

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
	"github.com/multiformats/go-multistream"
)

// handlerDialTimeout bounds reaching a handler, which is on this computer.
const handlerDialTimeout = 10 * time.Second

// openForClient opens a stream and returns the reply to the request.
func (d *daemon) openForClient(r *peerRequest) ([]byte, network.Stream, error) {
	if r == nil {
		return nil, nil, errMalformed
	}
	if len(r.protos) == 0 {
		return nil, nil, errors.New("no protocol given")
	}
	id, err := peer.IDFromBytes(r.peer)
	if err != nil {
		return nil, nil, fmt.Errorf("not a peer ID: %w", err)
	}
	ctx, cancel := d.deadline(r.timeout)
	defer cancel()
	s, err := d.negotiate(network.WithAllowLimitedConn(ctx, "p2pd"), id, protocol.ConvertFromStrings(r.protos))
	if err != nil {
		return nil, nil, errors.New(oneLine(err))
	}
	info := encodeStreamInfo([]byte(s.Conn().RemotePeer()), s.Conn().RemoteMultiaddr().Bytes(), string(s.Protocol()))
	return appendBytes(okResponse(), 3, info), s, nil
}

// negotiate opens a stream and agrees on a protocol before it returns. The host's NewStream would put that off until
// there is data, if the peer has announced the protocol before; but the peer's handler is to start at once, and if it
// has gone, that is an error to report and not an empty stream.
func (d *daemon) negotiate(ctx context.Context, id peer.ID, protos []protocol.ID) (network.Stream, error) {
	if err := d.host.Connect(ctx, peer.AddrInfo{ID: id}); err != nil {
		return nil, err
	}
	s, err := d.host.Network().NewStream(network.WithNoDial(ctx, "connected already"), id)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { s.Reset() })
	proto, err := multistream.SelectOneOf(protos, s)
	if !stop() {
		err = ctx.Err()
	}
	if err == nil {
		err = s.SetProtocol(proto)
	}
	if err != nil {
		s.Reset()
		return nil, fmt.Errorf("failed to negotiate protocol: %w", err)
	}
	return s, nil
}

// pipeClient joins a client's connection, whose reader may hold bytes already, to its stream.
func (d *daemon) pipeClient(conn net.Conn, br *bufio.Reader, s network.Stream) {
	defer d.hold(s)()
	if ahead := br.Buffered(); ahead > 0 {
		early, _ := br.Peek(ahead)
		if _, err := s.Write(early); err != nil {
			s.Reset()
			return
		}
	}
	pipe(conn, s)
}

// handlerAddr is the address of a stream handler, in a form that can be compared.
type handlerAddr struct{ network, target string }

func (r *handlerRequest) handler() (handlerAddr, error) {
	addr, err := ma.NewMultiaddrBytes(r.addr)
	if err != nil {
		return handlerAddr{}, fmt.Errorf("not an address: %w", err)
	}
	network, target, err := manet.DialArgs(addr)
	if err != nil {
		return handlerAddr{}, err
	}
	return handlerAddr{network, target}, nil
}

func (d *daemon) addStreamHandler(r *handlerRequest) error {
	if r == nil {
		return errMalformed
	}
	handler, err := r.handler()
	if err != nil {
		return err
	}
	for _, proto := range r.protos {
		err := d.streams.add(proto, handler, r.balanced, func() {
			d.host.SetStreamHandler(protocol.ID(proto), d.serveStream)
		})
		if err != nil {
			return fmt.Errorf("%s: %w", proto, err)
		}
	}
	return nil
}

func (d *daemon) removeStreamHandler(r *handlerRequest) error {
	if r == nil {
		return errMalformed
	}
	handler, err := r.handler()
	if err != nil {
		return err
	}
	for _, proto := range r.protos {
		if err := d.streams.remove(proto, handler, func() { d.forgetProtocol(proto) }); err != nil {
			return fmt.Errorf("%s: %w", proto, err)
		}
	}
	return nil
}

// serveStream hands a peer's stream to the handler whose turn it is, or to the next one that can be reached: an address
// stays registered when its client dies.
func (d *daemon) serveStream(s network.Stream) {
	defer d.hold(s)()
	for _, handler := range d.streams.pick(string(s.Protocol())) {
		conn, err := d.dialHandler(handler, s)
		if err != nil {
			log.Warnw("cannot reach a stream handler", "address", handler.target, "protocol", s.Protocol(), "error", err)
			continue
		}
		pipe(conn, s)
		d.untrack(conn)
		return
	}
	s.Reset()
}

// dialHandler connects to a handler and introduces the stream to it.
func (d *daemon) dialHandler(handler handlerAddr, s network.Stream) (net.Conn, error) {
	dialer := net.Dialer{Timeout: handlerDialTimeout}
	conn, err := dialer.DialContext(d.ctx, handler.network, handler.target)
	if err != nil {
		return nil, err
	}
	if !d.track(conn) {
		conn.Close()
		return nil, net.ErrClosed
	}
	if d.secret != nil && handler.network != "unix" {
		err = d.secret.show(conn)
	}
	if err == nil {
		remote := s.Conn()
		info := encodeStreamInfo([]byte(remote.RemotePeer()), remote.RemoteMultiaddr().Bytes(), string(s.Protocol()))
		err = writeMessages(conn, [][]byte{info})
	}
	if err != nil {
		d.untrack(conn)
		return nil, err
	}
	return conn, nil
}
