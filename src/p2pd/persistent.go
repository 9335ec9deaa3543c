package main

// Persistent connections: unary handlers and calls, many at once, told apart by call ID.

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"google.golang.org/protobuf/encoding/protowire"
)

// openTimeout bounds finding and dialling a peer and agreeing on a protocol. A call itself has no limit: its client
// decides how long to wait.
const openTimeout = 60 * time.Second

var errCallIDInUse = errors.New("this call ID is in use")

// persistentConn is one client's persistent connection.
type persistentConn struct {
	d    *daemon
	conn net.Conn
	ctx  context.Context // ends with the connection

	writing sync.Mutex

	mu      sync.Mutex
	closed  bool
	calls   map[callID]*outgoingCall
	serving map[callID]network.Stream // calls that this client has to answer, by the stream of the caller
}

type outgoingCall struct{ cancel context.CancelFunc }

// servePersistent runs an upgraded connection until it ends, then clears away what belonged to it.
func (d *daemon) servePersistent(conn net.Conn, br *bufio.Reader) {
	ctx, cancel := context.WithCancel(d.ctx)
	c := &persistentConn{
		d: d, conn: conn, ctx: ctx,
		calls: make(map[callID]*outgoingCall), serving: make(map[callID]network.Stream),
	}
	defer c.clear()
	defer cancel()
	for {
		f, err := readFrame(br, d.opts.maxMessage)
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				log.Debugw("persistent connection ends", "error", err)
			}
			return
		}
		r, err := parsePersistentRequest(f.payload())
		if err != nil {
			log.Warnw("closing a persistent connection: malformed message", "error", err)
			return
		}
		if !c.take(r, f) {
			f.release()
		}
	}
}

// take starts the work that a message asks for, without waiting for it. It reports whether the frame was kept.
func (c *persistentConn) take(r persistentRequest, f frame) bool {
	if !r.validID {
		return false
	}
	switch r.kind {
	case fieldCallUnary:
		ctx, cancel := context.WithCancel(c.ctx)
		call := &outgoingCall{cancel: cancel}
		if !c.startCall(r.id, call) {
			cancel()
			go c.send(daemonError(r.id, errCallIDInUse))
			return false
		}
		go c.call(ctx, call, r, f)
		return true
	case fieldUnaryResponse:
		s := c.endServing(r.id)
		if s == nil {
			return false // the caller is gone
		}
		go respond(s, f)
		return true
	case fieldCancelRequest:
		c.mu.Lock()
		call := c.calls[r.id]
		c.mu.Unlock()
		if call != nil {
			call.cancel()
		}
	case fieldAddUnaryHandler:
		go c.confirm(r.id, c.d.addUnaryHandler(c, r.handler))
	case fieldRemoveUnaryHandler:
		go c.confirm(r.id, c.d.removeUnaryHandler(c, r.handler))
	}
	return false
}

// confirm answers a request that has no result of its own.
func (c *persistentConn) confirm(id callID, err error) {
	if err != nil {
		c.send(daemonError(id, err))
		return
	}
	c.send(persistentResponse(id, 0, nil))
}

// send writes one message, given in parts, as one frame. A client that cannot be written to is disconnected.
func (c *persistentConn) send(parts ...[]byte) {
	length := 0
	for _, p := range parts {
		length += len(p)
	}
	out := append(net.Buffers{protowire.AppendVarint(nil, uint64(length))}, parts...)
	c.writing.Lock()
	defer c.writing.Unlock()
	if _, err := out.WriteTo(c.conn); err != nil {
		c.conn.Close()
	}
}

// clear ends everything that depended on this client: its handlers, the calls it made and the calls it was serving.
func (c *persistentConn) clear() {
	c.conn.Close()
	c.d.unary.removeAll(c, c.d.forgetProtocol)
	c.mu.Lock()
	c.closed = true
	orphans := c.serving
	c.serving = nil
	c.mu.Unlock()
	for _, s := range orphans {
		s.Reset()
	}
}

func (c *persistentConn) startCall(id callID, call *outgoingCall) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.calls[id] != nil {
		return false
	}
	c.calls[id] = call
	return true
}

func (c *persistentConn) endCall(id callID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.calls, id)
}

// startServing notes a call to be answered by this client. It fails when the client has just gone, or when a peer
// chose an ID that is taken.
func (c *persistentConn) startServing(id callID, s network.Stream) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, taken := c.serving[id]; taken || c.closed {
		return false
	}
	c.serving[id] = s
	return true
}

// endServing takes a call off the list; nil if it is not there (any more).
func (c *persistentConn) endServing(id callID) network.Stream {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.serving[id]
	delete(c.serving, id)
	return s
}

// call makes one unary call and tells the client how it ended.
func (c *persistentConn) call(ctx context.Context, call *outgoingCall, r persistentRequest, request frame) {
	defer call.cancel()
	answer, reply, err := c.d.callPeer(ctx, r, request)
	c.endCall(r.id)
	switch {
	case c.ctx.Err() != nil: // nobody is left to tell
		if err == nil {
			reply.release()
		}
	case err == nil:
		c.send(answerHead(r.id, len(answer)), answer)
		reply.release()
	case ctx.Err() != nil:
		c.send(persistentResponse(r.id, fieldCancelResponse, nil))
	default:
		c.send(daemonError(r.id, err))
	}
}

// callPeer makes one unary call. The request frame is sent on as the client wrote it, and released. On success the
// encoded answer is returned, a part of the frame that comes with it.
func (d *daemon) callPeer(ctx context.Context, r persistentRequest, request frame) ([]byte, frame, error) {
	s, err := d.openStream(ctx, r.call.peer, r.call.proto)
	if err != nil {
		request.release()
		return nil, frame{}, err
	}
	defer d.hold(s)()
	// The stream stays open for writing until the answer is here: the other side takes its end for a cancellation.
	stop := context.AfterFunc(ctx, func() { s.Reset() })
	defer stop()
	_, err = s.Write(request.whole())
	request.release()
	if err != nil {
		s.Reset()
		return nil, frame{}, fmt.Errorf("cannot send the request: %w", err)
	}
	br := takeReader(s)
	defer giveReader(br)
	reply, err := readFrame(br, d.opts.maxMessage)
	if err != nil {
		s.Reset()
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			err = errors.New("EOF: the peer closed the stream without an answer")
		}
		return nil, frame{}, err
	}
	s.Close()
	answer, err := parseAnswer(reply.payload())
	if err != nil {
		reply.release()
		return nil, frame{}, err
	}
	return answer, reply, nil
}

// openStream opens a stream to a peer, over a relay if there is no other way, searching the DHT for its addresses if
// none is known.
func (d *daemon) openStream(ctx context.Context, peerID []byte, proto string) (network.Stream, error) {
	id, err := peer.IDFromBytes(peerID)
	if err != nil {
		return nil, fmt.Errorf("not a peer ID: %w", err)
	}
	ctx, cancel := context.WithTimeout(network.WithAllowLimitedConn(ctx, "p2pd"), openTimeout)
	defer cancel()
	s, err := d.host.NewStream(ctx, id, protocol.ID(proto))
	if err != nil {
		return nil, errors.New(oneLine(err))
	}
	return s, nil
}

func (d *daemon) addUnaryHandler(c *persistentConn, h handlerName) error {
	return d.unary.add(h.proto, c, h.balanced, func() {
		d.host.SetStreamHandler(protocol.ID(h.proto), d.serveUnary)
	})
}

func (d *daemon) removeUnaryHandler(c *persistentConn, h handlerName) error {
	return d.unary.remove(h.proto, c, func() { d.forgetProtocol(h.proto) })
}

func (d *daemon) forgetProtocol(proto string) { d.host.RemoveStreamHandler(protocol.ID(proto)) }

// serveUnary takes one call from a peer to a handler. The answer, when the client has one, is written by respond.
func (d *daemon) serveUnary(s network.Stream) {
	defer d.hold(s)()
	br := takeReader(s)
	defer giveReader(br)
	f, err := readFrame(br, d.opts.maxMessage)
	if err != nil {
		s.Close()
		return
	}
	r, err := parsePersistentRequest(f.payload())
	proto := string(s.Protocol()) // what was negotiated, not what the caller says
	handlers := d.unary.pick(proto)
	if err != nil || !r.validID || r.kind != fieldCallUnary || len(handlers) == 0 {
		f.release()
		s.Close()
		return
	}
	c := handlers[0]
	if !c.startServing(r.id, s) {
		f.release()
		s.Reset()
		return
	}
	caller := s.Conn().RemotePeer()
	c.send(handlingHead(r.id, []byte(caller), proto, len(r.call.data)), r.call.data)
	f.release()
	// Whatever comes now, end, reset or one more byte, means that the caller has lost interest, unless the answer has
	// been given: then it is the caller's good-bye.
	br.ReadByte()
	if c.endServing(r.id) != nil {
		c.send(persistentResponse(r.id, fieldCancelResponse, nil))
		s.Reset()
	}
}

// respond sends a handler's answer, as the client wrote it, and ends the call.
func respond(s network.Stream, answer frame) {
	defer answer.release()
	if _, err := s.Write(answer.whole()); err != nil {
		s.Reset()
		return
	}
	s.Close()
}
