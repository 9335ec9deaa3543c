package main

// Fuzz targets for everything that reads what others wrote: clients on the control socket, and peers.

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"sync"
	"testing"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
)

const (
	fuzzLimit = 1 << 30 // the largest that can be set: only what has arrived may cost memory
	// What reading n bytes may allocate: fixed costs, and a multiple of n for what is made of each small field.
	fuzzFixed, fuzzFactor = 1 << 20, 100
)

// seeds are one well-formed message of every kind, and some that are not.
func seeds() [][]byte {
	id := callID{1, 2, 3}
	requests := [][]byte{
		{},
		appendEnum(nil, 1, reqIdentify),
		appendBytes(appendEnum(nil, 1, reqConnect), 2, appendEnum(encodePeerAddrs(peerAddrs{[]byte("peer"), [][]byte{{4, 127, 0, 0, 1}}}), 3, 5)),
		appendBytes(appendEnum(nil, 1, reqStreamOpen), 3, appendString(appendString(nil, 1, "peer"), 2, "proto")),
		appendBytes(appendEnum(nil, 1, reqStreamHandler), 4, appendEnum(appendString(appendString(nil, 1, "addr"), 2, "proto"), 3, 1)),
		appendBytes(appendEnum(nil, 1, reqDHT), 5, appendBytes(appendEnum(nil, 1, dhtFindPeer), 2, []byte("peer"))),
		appendBytes(appendEnum(nil, 1, reqConnManager), 6, appendEnum(nil, 1, 2)),
		appendBytes(appendEnum(nil, 1, reqDisconnect), 7, appendString(nil, 1, "peer")),
		appendBytes(appendEnum(nil, 1, reqPubsub), 8, appendEnum(nil, 1, 0)),
		appendBytes(appendEnum(nil, 1, reqRemoveStreamHandler), 9, appendString(nil, 1, "addr")),
		appendEnum(nil, 1, reqPersistentUpgrade),
		persistentResponse(id, fieldAddUnaryHandler, appendEnum(appendString(nil, 1, "proto"), 2, 1)),
		persistentResponse(id, fieldRemoveUnaryHandler, appendString(nil, 1, "proto")),
		persistentResponse(id, fieldCallUnary, callContent("peer", "proto", []byte("data"))),
		persistentResponse(id, fieldUnaryResponse, appendString(nil, 1, "answer")),
		persistentResponse(id, fieldCancelRequest, nil),
		persistentResponse(callID{}, 0, nil),
	}
	var all [][]byte
	for _, message := range requests {
		all = append(all, appendFrame(nil, message))
	}
	return append(all,
		bytes.Join(all, nil),
		[]byte{0x80, 0x80, 0x80, 0x80, 0x80, 0x20}, // 2^40
		[]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, // no length at all
		append([]byte{0xff, 0xff, 0xff, 0x3f}, make([]byte, 100)...),                   // much less than it says
	)
}

func addSeeds(f *testing.F) {
	for _, seed := range seeds() {
		f.Add(seed)
	}
}

// bounded fails when f takes more memory than what it reads justifies.
func bounded(t *testing.T, read int, f func()) {
	if taken := allocated(f); taken > fuzzFixed+fuzzFactor*uint64(read) {
		t.Errorf("%d bytes allocated for %d read", taken, read)
	}
}

// FuzzControl reads frames as requests and as messages of a persistent connection.
func FuzzControl(f *testing.F) {
	addSeeds(f)
	f.Fuzz(func(t *testing.T, in []byte) {
		bounded(t, len(in), func() {
			br := bufio.NewReader(bytes.NewReader(in))
			for {
				frame, err := readFrame(br, fuzzLimit)
				if err != nil {
					return
				}
				if r, err := parseRequest(frame.payload()); err == nil && (r.kind < reqIdentify || r.kind > reqRemoveStreamHandler) {
					t.Errorf("request type %d passed", r.kind)
				}
				if r, err := parsePersistentRequest(frame.payload()); err == nil && r.kind == fieldCallUnary {
					checkHandling(t, r)
				}
				frame.release()
			}
		})
	})
}

// checkHandling passes a call on as to a handler, and reads that back.
func checkHandling(t *testing.T, r persistentRequest) {
	whole := append(handlingHead(r.id, r.call.peer, r.call.proto, len(r.call.data)), r.call.data...)
	message, err := decode(whole)
	if err != nil {
		t.Fatalf("what a handler gets cannot be read: %v", err)
	}
	call, err := parseUnaryCall(message.bytes[fieldRequestHandling][0])
	if err != nil || callID(message.bytes[1][0]) != r.id || !bytes.Equal(call.peer, r.call.peer) || call.proto != r.call.proto ||
		!bytes.Equal(call.data, r.call.data) {
		t.Fatalf("%+v became %+v, %v", r.call, call, err)
	}
}

// output collects what is written, by several goroutines.
type output struct {
	mu sync.Mutex
	bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.Buffer.Write(b)
}

// fakeConn is a client that has written everything already.
type fakeConn struct {
	net.Conn // nil: what is not overridden must not be used
	in       io.Reader
	out      output
}

func (c *fakeConn) Read(b []byte) (int, error)  { return c.in.Read(b) }
func (c *fakeConn) Write(b []byte) (int, error) { return c.out.Write(b) }
func (c *fakeConn) Close() error                { return nil }

// FuzzPersistent is a client of a persistent connection, of a daemon that knows no peer.
func FuzzPersistent(f *testing.F) {
	d := startDaemon(f, "-persistentConnMaxMsgSize=1073741824", "-noListenAddrs=1")
	addSeeds(f)
	f.Fuzz(func(t *testing.T, in []byte) {
		bounded(t, len(in), func() {
			conn := &fakeConn{in: bytes.NewReader(in)}
			d.servePersistent(conn, bufio.NewReader(conn))
		})
		d.unary.mu.Lock()
		defer d.unary.mu.Unlock()
		for proto, r := range d.unary.byProto {
			for _, c := range r.slots {
				c.mu.Lock()
				if c.closed {
					t.Errorf("%q keeps a handler whose client has gone", proto)
				}
				c.mu.Unlock()
			}
		}
	})
}

// fakeStream is a peer that has written everything already, and then closed.
type fakeStream struct {
	network.Stream // nil
	in             io.Reader
	out            output
	remote         peer.ID
}

// fakePeerConn is the connection that a fakeStream belongs to.
type fakePeerConn struct {
	network.Conn // nil
	remote       peer.ID
}

func (c fakePeerConn) RemotePeer() peer.ID { return c.remote }

func (s *fakeStream) Read(b []byte) (int, error)  { return s.in.Read(b) }
func (s *fakeStream) Write(b []byte) (int, error) { return s.out.Write(b) }
func (s *fakeStream) Close() error                { return nil }
func (s *fakeStream) Reset() error                { return nil }
func (s *fakeStream) Protocol() protocol.ID       { return proto }
func (s *fakeStream) Conn() network.Conn          { return fakePeerConn{remote: s.remote} }

// FuzzWire is a peer: it calls a handler, and it answers a call.
func FuzzWire(f *testing.F) {
	d := startDaemon(f, "-persistentConnMaxMsgSize=1073741824", "-noListenAddrs=1")
	addSeeds(f)
	f.Fuzz(func(t *testing.T, in []byte) {
		conn := &fakeConn{}
		c := &persistentConn{d: d, conn: conn, ctx: d.ctx, calls: map[callID]*outgoingCall{}, serving: map[callID]network.Stream{}}
		if err := d.unary.add(proto, c, false, nothing); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := d.unary.remove(proto, c, nothing); err != nil {
				t.Fatal(err)
			}
		}()
		s := &fakeStream{in: bytes.NewReader(in), remote: "the caller"}
		bounded(t, len(in), func() { d.serveUnary(s) })
		if len(c.serving) != 0 || s.out.Len() != 0 {
			t.Error("a call that ended is still served, or was answered")
		}
		checkDelivered(t, conn.out.Bytes(), in)

		bounded(t, len(in), func() {
			answer, err := readFrame(bufio.NewReader(bytes.NewReader(in)), fuzzLimit)
			if err != nil {
				return
			}
			if content, err := parseAnswer(answer.payload()); err == nil && !bytes.Contains(in, content) {
				t.Error("an answer that nobody gave")
			}
			answer.release()
		})
	})
}

// checkDelivered looks at what the handler got: nothing, or the call with the true caller, then its cancellation.
func checkDelivered(t *testing.T, out, in []byte) {
	if len(out) == 0 {
		return
	}
	br := bufio.NewReader(bytes.NewReader(out))
	var got []fields
	for {
		frame, err := readFrame(br, fuzzLimit)
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		message, err := decode(frame.payload())
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, message)
	}
	if len(got) != 2 || got[0].bytes[fieldRequestHandling] == nil || got[1].bytes[fieldCancelResponse] == nil {
		t.Fatalf("the handler got %v", got)
	}
	call, err := parseUnaryCall(got[0].bytes[fieldRequestHandling][0])
	if err != nil || string(call.peer) != "the caller" || call.proto != proto || !bytes.Contains(in, call.data) {
		t.Fatalf("the handler got %+v, %v", call, err)
	}
}
