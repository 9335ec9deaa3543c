package main

// When the daemon ends: it lives for its clients, so it goes when the last of them has gone, or none ever came.

import (
	"sync"
	"time"
)

// life counts persistent connections and says once, with a reason, that the daemon is to end.
type life struct {
	mu      sync.Mutex
	clients int
	idle    *time.Timer
	ended   chan struct{}
	reason  string
}

func newLife() *life { return &life{ended: make(chan struct{})} }

// end asks the daemon to stop; the first reason counts.
func (l *life) end(reason string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.endLocked(reason)
}

func (l *life) endLocked(reason string) {
	select {
	case <-l.ended:
	default:
		l.reason = reason
		close(l.ended)
	}
}

// expectClient ends the daemon if no client opens a persistent connection in time. Zero waits for ever.
func (l *life) expectClient(timeout time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if timeout > 0 && l.clients == 0 {
		l.idle = time.AfterFunc(timeout, func() { l.end("no client came within the idle timeout") })
	}
}

func (l *life) opened() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.clients++
	if l.idle != nil {
		l.idle.Stop()
		l.idle = nil
	}
}

func (l *life) closed() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.clients--; l.clients == 0 {
		l.endLocked("the last client has left")
	}
}

// interrupt is Ctrl+C, which a terminal sends to the client as well. The client decides then; without one the daemon
// ends.
func (l *life) interrupt() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.clients == 0 {
		l.endLocked("interrupted")
	}
}
