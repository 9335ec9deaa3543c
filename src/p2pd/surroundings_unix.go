//go:build unix

package main

import (
	"errors"
	"os"
	"os/signal"
	"syscall"
)

// watchSurroundings ends the daemon on a signal, and when the parent process goes.
func watchSurroundings(l *life) {
	// An orphan's output has no reader; writing to it must not kill the process before it has cleaned up.
	signal.Ignore(syscall.SIGPIPE)
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		for s := range signals {
			if s == syscall.SIGINT {
				l.interrupt()
				continue
			}
			l.end(s.String())
		}
	}()
	watchParent(l)
	watchInput(l)
}

func isAddrInUse(err error) bool { return errors.Is(err, syscall.EADDRINUSE) }

// privateUmask lets the files made before the returned function is called be opened by their owner alone.
func privateUmask() (restore func()) {
	old := syscall.Umask(0o177)
	return func() { syscall.Umask(old) }
}
