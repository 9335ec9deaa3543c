// Command p2pd is the peer-to-peer daemon of petals-win: Python programs drive it over a control socket, and it talks
// to other peers through libp2p. README.md describes both sides.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"time"
)

// Set by the linker.
var (
	version = "development"
	commit  = "unknown"
)

// Exit codes.
const (
	exitOK    = 0
	exitError = 1
	exitUsage = 2
)

// stopTimeout bounds leaving: a peer that does not let go of a connection must not keep the process.
const stopTimeout = 5 * time.Second

func main() {
	// Linux tells the death of the parent to one thread: the one that asks for it. It must not end before the process.
	runtime.LockOSThread()
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

// run is the program. A failure is one line, the last one on stderr.
func run(args []string, stdout, stderr io.Writer) int {
	secret, err := takeSecret()
	if err != nil {
		return fail(stderr, err)
	}
	o, err := parseFlags(args, stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return exitOK
	case err != nil:
		return fail(stderr, err)
	case o.showVersion:
		fmt.Fprintf(stdout, "p2pd %s (commit %s, %s)\n", version, commit, runtime.Version())
		return exitOK
	}
	setUpLogging()

	d, err := newDaemon(o, secret)
	if err != nil {
		return fail(stderr, err)
	}
	watchSurroundings(d.life)
	if err := d.join(); err != nil {
		stopInTime(d)
		return fail(stderr, err)
	}
	if !o.quiet {
		io.WriteString(stdout, d.startLines())
	}
	go d.serve()
	<-d.life.ended
	log.Infow("leaving", "reason", d.life.reason)
	stopInTime(d)
	return exitOK
}

func fail(stderr io.Writer, err error) int {
	fmt.Fprintf(stderr, "p2pd: %s\n", oneLine(err))
	var usage usageError
	if errors.As(err, &usage) {
		return exitUsage
	}
	return exitError
}

func stopInTime(d *daemon) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		d.stop()
	}()
	select {
	case <-done:
	case <-time.After(stopTimeout):
		log.Errorw("some connections would not close in time")
	}
}

// startLines is what tells a parent process that the daemon is ready, in one write.
func (d *daemon) startLines() string {
	var b strings.Builder
	fmt.Fprintf(&b, "Control socket: %s\n", d.listener.shown)
	fmt.Fprintf(&b, "Peer ID: %s\n", d.host.ID())
	fmt.Fprintf(&b, "Peer Addrs:\n")
	for _, a := range printable(d.host.Addrs()) {
		fmt.Fprintf(&b, "%s\n", a)
	}
	if d.opts.bootstrap && d.opts.ownBootstrap {
		fmt.Fprintf(&b, "Bootstrap peers:\n")
		for _, p := range d.opts.bootstrapFrom {
			for _, a := range p.Addrs {
				fmt.Fprintf(&b, "%s/p2p/%s\n", a, p.ID)
			}
		}
	}
	return b.String()
}
