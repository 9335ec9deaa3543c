package main

import (
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
)

// watchParent ends the daemon when the parent process dies. The kernel signals the end of the thread that started the
// daemon, though; the process may live on, and then this is no reason to end.
//
// It must be called on the main thread.
func watchParent(l *life) {
	parent := os.Getppid()
	orphaned := make(chan os.Signal, 1)
	signal.Notify(orphaned, syscall.SIGUSR2)
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(syscall.SIGUSR2), 0, 0, 0); err != nil {
		log.Warnw("the parent process cannot be watched", "error", err)
	}
	go func() {
		for range orphaned {
			if os.Getppid() != parent {
				l.end("the parent process has died")
			}
		}
	}()
	if os.Getppid() != parent { // it died before the kernel was asked
		l.end("the parent process has died")
	}
}
