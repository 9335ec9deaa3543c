package main

// A client of the control socket, for tests: what hivemind's Python does, in Go.

import (
	"bufio"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
	"google.golang.org/protobuf/encoding/protowire"
)

// patience bounds every wait of a test.
const patience = 20 * time.Second

// startDaemon runs a daemon in this process until the test ends.
func startDaemon(t testing.TB, args ...string) *daemon {
	t.Helper()
	// TCP: it works on every system, and a test's own folder may be too deep for a Unix socket.
	o, err := parseFlags(append([]string{"-listen=/ip4/127.0.0.1/tcp/0", "-hostAddrs=/ip4/127.0.0.1/tcp/0"}, args...), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := newSecrets(testSecret)
	if err != nil {
		t.Fatal(err)
	}
	d, err := newDaemon(o, secret)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		d.serve()
	}()
	t.Cleanup(func() {
		d.stop()
		<-served
	})
	return d
}

// fields is a decoded message: the contents of its length-delimited fields, and its varints.
type fields struct {
	bytes   map[protowire.Number][][]byte
	varints map[protowire.Number]uint64
}

func decode(b []byte) (fields, error) {
	f := fields{map[protowire.Number][][]byte{}, map[protowire.Number]uint64{}}
	err := walk(b, func(num protowire.Number, v value) error {
		if v.isBytes() {
			f.bytes[num] = append(f.bytes[num], v.bytes)
		} else if v.isVarint() {
			f.varints[num] = v.varint
		}
		return nil
	})
	return f, err
}

// client is one control connection.
type client struct {
	t       testing.TB
	d       *daemon
	conn    net.Conn
	br      *bufio.Reader
	writing sync.Mutex
}

func dial(t testing.TB, d *daemon) *client {
	t.Helper()
	addr, err := ma.NewMultiaddr(d.listener.shown)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := manet.Dial(addr)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write(d.secret.inbound); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &client{t: t, d: d, conn: conn, br: bufio.NewReader(conn)}
}

func (c *client) send(message []byte) error {
	c.writing.Lock()
	defer c.writing.Unlock()
	_, err := c.conn.Write(appendFrame(nil, message))
	return err
}

func (c *client) receive() (fields, error) {
	f, err := readFrame(c.br, 1<<30)
	if err != nil {
		return fields{}, err
	}
	return decode(f.payload()) // not released: the fields are parts of it
}

// ask sends a request of the given type, its parameters in the given field, and returns the Response.
func (c *client) ask(kind uint64, field protowire.Number, parameters []byte) fields {
	c.t.Helper()
	message := appendEnum(nil, 1, kind)
	if parameters != nil {
		message = appendBytes(message, field, parameters)
	}
	if err := c.send(message); err != nil {
		c.t.Fatal(err)
	}
	if err := c.conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		c.t.Fatal(err)
	}
	reply, err := c.receive()
	if err != nil {
		c.t.Fatal(err)
	}
	return reply
}

// connectDaemons lets one daemon know and reach the other.
func connectDaemons(t testing.TB, from, to *daemon) {
	t.Helper()
	id := to.identity()
	if reply := dial(t, from).ask(reqConnect, 2, encodePeerAddrs(id)); reply.varints[1] != 0 {
		t.Fatalf("no connection: %q", reply.bytes[2])
	}
}

// session is a persistent connection whose replies are told apart by call ID.
type session struct {
	*client
	handled chan fields // calls from peers
	cancels chan callID // cancellations of them
	ended   chan struct{}

	mu      sync.Mutex
	waiting map[callID]chan fields
}

func upgrade(t testing.TB, d *daemon) *session {
	t.Helper()
	s := &session{
		client: dial(t, d), handled: make(chan fields, 4096), cancels: make(chan callID, 16), ended: make(chan struct{}),
		waiting: map[callID]chan fields{},
	}
	if reply := s.ask(reqPersistentUpgrade, 0, nil); reply.varints[1] != 0 {
		t.Fatal("no upgrade")
	}
	if err := s.conn.SetReadDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	go s.read()
	t.Cleanup(s.close)
	return s
}

func (s *session) close() {
	s.conn.Close()
	<-s.ended
}

func (s *session) read() {
	defer close(s.ended)
	for {
		reply, err := s.receive()
		if err != nil {
			return
		}
		id := callID(reply.bytes[1][0])
		s.mu.Lock()
		wanted := s.waiting[id]
		s.mu.Unlock()
		switch {
		case reply.bytes[fieldRequestHandling] != nil:
			s.handled <- reply
		case wanted != nil:
			wanted <- reply
		case reply.bytes[fieldCancelResponse] != nil:
			s.cancels <- id
		}
	}
}

// start sends a message whose oneof field has the given content; replies to it come through the channel.
func (s *session) start(field protowire.Number, content []byte) (callID, <-chan fields, error) {
	var id callID
	rand.Read(id[:])
	replies := make(chan fields, 2)
	s.mu.Lock()
	s.waiting[id] = replies
	s.mu.Unlock()
	return id, replies, s.say(id, field, content)
}

func (s *session) say(id callID, field protowire.Number, content []byte) error {
	return s.send(persistentResponse(id, field, content)) // requests and responses are alike but for the field numbers
}

func (s *session) forget(id callID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.waiting, id)
}

// do sends a message and waits for the reply to it.
func (s *session) do(field protowire.Number, content []byte) (fields, error) {
	id, replies, err := s.start(field, content)
	if err != nil {
		return fields{}, err
	}
	defer s.forget(id)
	select {
	case reply := <-replies:
		return reply, nil
	case <-s.ended:
		return fields{}, io.ErrUnexpectedEOF
	case <-time.After(patience):
		return fields{}, fmt.Errorf("no reply within %s", patience)
	}
}

func (s *session) add(proto string, balanced bool) error {
	content := appendEnum(appendString(nil, 1, proto), 2, protowire.EncodeBool(balanced))
	return daemonErrorOf(s.do(fieldAddUnaryHandler, content))
}

func (s *session) remove(proto string) error {
	return daemonErrorOf(s.do(fieldRemoveUnaryHandler, appendString(nil, 1, proto)))
}

func daemonErrorOf(reply fields, err error) error {
	if err != nil || reply.bytes[fieldDaemonError] == nil {
		return err
	}
	text, err := decode(reply.bytes[fieldDaemonError][0])
	if err != nil {
		return err
	}
	return daemonSays(text.bytes[1][0])
}

// daemonSays is the text of a daemonError.
type daemonSays string

func (e daemonSays) Error() string { return string(e) }

func callContent(peer, proto string, data []byte) []byte {
	return appendBytes(appendString(appendString(nil, 1, peer), 2, proto), 3, data)
}

// call makes a unary call and returns what the handler answered.
func (s *session) call(to *daemon, proto string, data []byte) ([]byte, error) {
	reply, err := s.do(fieldCallUnary, callContent(string(to.host.ID()), proto, data))
	if err := daemonErrorOf(reply, err); err != nil {
		return nil, err
	}
	answer, err := decode(reply.bytes[fieldCallUnaryResponse][0])
	if err != nil || answer.bytes[1] == nil {
		return nil, fmt.Errorf("no response in %v: %v", answer, err)
	}
	return answer.bytes[1][0], nil
}

// next waits for a call from a peer.
func (s *session) next() (callID, unaryCall) {
	s.t.Helper()
	select {
	case request := <-s.handled:
		call, err := parseUnaryCall(request.bytes[fieldRequestHandling][0])
		if err != nil {
			s.t.Fatal(err)
		}
		return callID(request.bytes[1][0]), call
	case <-time.After(patience):
		s.t.Fatal("no call came")
	}
	panic("not reached")
}

func (s *session) answer(id callID, data []byte) error {
	return s.say(id, fieldUnaryResponse, appendBytes(nil, 1, data))
}

// echo answers every call with its own data until the session ends.
func (s *session) echo() {
	for {
		select {
		case request := <-s.handled:
			call, err := parseUnaryCall(request.bytes[fieldRequestHandling][0])
			if err != nil {
				s.t.Error(err)
				return
			}
			if err := s.answer(callID(request.bytes[1][0]), call.data); err != nil {
				return // the session has ended
			}
		case <-s.ended:
			return
		}
	}
}
