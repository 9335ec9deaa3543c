package main

// The control socket: one listener, requests one after another on each connection.

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

// controlListener accepts clients; shown is the address to print, with the bound port in place of port 0.
type controlListener struct {
	net.Listener
	shown string
	tcp   bool
}

// listenControl opens the control socket. A TCP port needs a secret, since any local user can reach it; a Unix socket
// has its file mode.
func listenControl(address string, secret *secrets) (*controlListener, error) {
	addr, err := ma.NewMultiaddr(address)
	if err != nil {
		return nil, fmt.Errorf("-listen=%s is not an address: %w", address, err)
	}
	network, target, err := manet.DialArgs(addr)
	if err != nil {
		return nil, fmt.Errorf("-listen=%s is not an address to listen on: %w", address, err)
	}
	switch network {
	case "unix":
		return listenUnix(address, target)
	case "tcp4", "tcp6":
	default:
		return nil, fmt.Errorf("-listen=%s: only /unix and /ip4/…/tcp addresses can carry the control socket", address)
	}
	if !manet.IsIPLoopback(addr) {
		return nil, fmt.Errorf("-listen=%s would open the control socket to the network; use /ip4/127.0.0.1/tcp/0", address)
	}
	if secret == nil {
		return nil, fmt.Errorf("-listen=%s needs a secret in the environment variable %s, because every user of this "+
			"computer can reach a TCP port", address, secretVariable)
	}
	listener, err := net.Listen(network, target)
	if err != nil {
		return nil, listenError("the control socket", address, err)
	}
	bound, err := manet.FromNetAddr(listener.Addr())
	if err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	return &controlListener{Listener: listener, shown: bound.String(), tcp: true}, nil
}

func listenUnix(address, path string) (*controlListener, error) {
	// Not chmod afterwards: there must be no moment at which others can connect.
	restore := privateUmask()
	listener, err := net.Listen("unix", path)
	restore()
	if err != nil {
		return nil, listenError("the control socket", address, err)
	}
	return &controlListener{Listener: listener, shown: address}, nil
}

// serveControl accepts clients until the listener is closed.
func (d *daemon) serveControl(listener *controlListener) {
	for {
		conn, err := listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			// Out of file descriptors, for instance: that can pass.
			log.Errorw("cannot accept a control connection", "error", err)
			time.Sleep(100 * time.Millisecond)
			continue
		}
		if !d.track(conn) {
			conn.Close()
			return
		}
		go func() {
			defer d.untrack(conn)
			if listener.tcp {
				if err := d.secret.check(conn); err != nil {
					log.Errorw("refused a control connection", "from", conn.RemoteAddr().String(), "error", err)
					return
				}
			}
			d.serveClient(conn)
		}()
	}
}

// serveClient answers requests until the connection ends or turns into something else.
func (d *daemon) serveClient(conn net.Conn) {
	br := bufio.NewReaderSize(conn, controlReaderSize)
	for {
		f, err := readFrame(br, d.opts.maxMessage)
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				log.Debugw("control connection ends", "error", err)
			}
			return
		}
		req, err := parseRequest(f.payload())
		if err != nil {
			log.Warnw("closing a control connection: malformed request", "error", err)
			return
		}
		reply, next := d.handle(req)
		f.release()
		if next.persistent {
			// Counted before it is told: with the answer in its hands a client may rely on being one.
			d.life.opened()
			defer d.life.closed()
		}
		if err := writeMessages(conn, reply); err != nil {
			if next.stream != nil {
				next.stream.Reset()
			}
			return
		}
		switch {
		case next.stream != nil:
			d.pipeClient(conn, br, next.stream)
			return
		case next.persistent:
			d.servePersistent(conn, br)
			return
		}
	}
}

const controlReaderSize = 16 << 10

// writeMessages sends messages, each as a frame.
func writeMessages(conn net.Conn, messages [][]byte) error {
	var out []byte
	for _, m := range messages {
		out = appendFrame(out, m)
	}
	_, err := conn.Write(out)
	return err
}

// deadline turns a request's timeout into a context; none, or a negative one, means a minute.
func (d *daemon) deadline(seconds int64) (context.Context, context.CancelFunc) {
	const fallback, longest = 60, 24 * 60 * 60
	if seconds <= 0 {
		seconds = fallback
	}
	return context.WithTimeout(d.ctx, time.Duration(min(seconds, longest))*time.Second)
}

// oneLine flattens the multi-line texts of libp2p's dial errors.
func oneLine(err error) string {
	return strings.Join(strings.Fields(err.Error()), " ")
}
