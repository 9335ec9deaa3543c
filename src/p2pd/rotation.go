package main

// Handlers by protocol name, taken in turns.

import (
	"errors"
	"slices"
	"sync"
)

var (
	errHandlerExists  = errors.New("a handler for this protocol is registered already")
	errHandlerUnknown = errors.New("no handler for this protocol is registered")
	errHandlerForeign = errors.New("the handler for this protocol belongs to another client")
)

// rotations maps a protocol to the handlers that serve it in turns; H is a persistent connection or an address.
type rotations[H comparable] struct {
	mu      sync.Mutex
	byProto map[string]*rotation[H]
}

type rotation[H comparable] struct {
	slots []H
	next  int
}

// add registers a handler. Only a balanced one may join a protocol that has handlers. onFirst is called, under the
// lock, when the protocol had none.
func (r *rotations[H]) add(proto string, handler H, balanced bool, onFirst func()) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	known, found := r.byProto[proto]
	switch {
	case !found:
		if r.byProto == nil {
			r.byProto = make(map[string]*rotation[H])
		}
		r.byProto[proto] = &rotation[H]{slots: []H{handler}}
		onFirst()
	case balanced:
		known.slots = append(known.slots, handler)
	default:
		return errHandlerExists
	}
	return nil
}

// remove drops one slot of the handler. onLast is called, under the lock, when none is left for the protocol.
func (r *rotations[H]) remove(proto string, handler H, onLast func()) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	known, found := r.byProto[proto]
	if !found {
		return errHandlerUnknown
	}
	i := slices.Index(known.slots, handler)
	if i < 0 {
		return errHandlerForeign
	}
	known.slots = slices.Delete(known.slots, i, i+1)
	if known.next > i {
		known.next--
	}
	if len(known.slots) == 0 {
		delete(r.byProto, proto)
		onLast()
	}
	return nil
}

// removeAll drops every slot of the handler. onLast is called, under the lock, for each protocol that has none left.
func (r *rotations[H]) removeAll(handler H, onLast func(proto string)) {
	r.mu.Lock()
	var protos []string
	for proto, known := range r.byProto {
		for _, slot := range known.slots {
			if slot == handler {
				protos = append(protos, proto)
			}
		}
	}
	r.mu.Unlock()
	for _, proto := range protos {
		// It may have been removed by its client since.
		_ = r.remove(proto, handler, func() { onLast(proto) })
	}
}

// pick returns the handlers of a protocol, the one whose turn it is first, and moves the turn on.
func (r *rotations[H]) pick(proto string) []H {
	r.mu.Lock()
	defer r.mu.Unlock()
	known, found := r.byProto[proto]
	if !found {
		return nil
	}
	first := known.next % len(known.slots)
	known.next = first + 1
	return slices.Concat(known.slots[first:], known.slots[:first])
}
