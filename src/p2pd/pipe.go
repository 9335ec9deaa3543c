package main

// Joining a local socket and a libp2p stream.

import (
	"io"
	"net"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
)

const (
	pipeBufferSize = 128 << 10
	// lingerTimeout is how long a client may take to close its side after the peer closed: closing a TCP socket with
	// unread input would destroy what the client has not read yet.
	lingerTimeout = 5 * time.Second
)

var pipeBuffers = sync.Pool{New: func() any { return new([pipeBufferSize]byte) }}

// pipe copies both ways until either side ends; there is no half-close, the first end closes both sides. It closes
// both before it returns.
//
// A direction ends when its source does. When only its sink fails, it goes quiet and leaves the verdict to the other
// direction, which may still have bytes to deliver.
func pipe(conn net.Conn, s network.Stream) {
	toPeer := make(chan struct{})
	go func() {
		defer close(toPeer)
		if _, sinkErr := copyAll(s, conn); sinkErr != nil {
			// Keep reading, so that a client in the middle of a write gets to see the end of the stream.
			_, _ = io.Copy(io.Discard, conn)
		}
		// A client that closes with unread input shows as an error. Resetting the stream would take back its last words.
		s.Close()
	}()
	err, sinkErr := copyAll(conn, s)
	switch {
	case err == io.EOF:
		s.Close()
		finish(conn)
	case sinkErr == nil:
		s.Close()
		conn.Close()
	}
	<-toPeer
	conn.Close()
	s.Close()
}

// copyAll copies until the source or the sink fails. It returns the source's error (io.EOF at its end) or the sink's.
func copyAll(dst io.Writer, src io.Reader) (srcErr, dstErr error) {
	buf := pipeBuffers.Get().(*[pipeBufferSize]byte)
	defer pipeBuffers.Put(buf)
	for {
		n, err := src.Read(buf[:])
		if n > 0 {
			if _, werr := dst.Write(buf[:n]); werr != nil {
				return nil, werr
			}
		}
		if err != nil {
			return err, nil
		}
	}
}

// finish tells the client that no more comes. Where that is safe, it closes at once: a client that goes on writing has to
// learn that nobody is there. A TCP socket gets time to be closed by the client first.
func finish(conn net.Conn) {
	if _, local := conn.(*net.UnixConn); local {
		conn.Close() // what the client has not read yet stays readable
		return
	}
	if half, ok := conn.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite()
	}
	_ = conn.SetReadDeadline(time.Now().Add(lingerTimeout))
}
