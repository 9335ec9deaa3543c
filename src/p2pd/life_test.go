package main

import (
	"testing"
	"time"
)

func (l *life) hasEnded() bool {
	select {
	case <-l.ended:
		return true
	default:
		return false
	}
}

func TestLifeEndsWithTheLastClient(t *testing.T) {
	l := newLife()
	l.opened()
	l.opened()
	l.closed()
	if l.hasEnded() {
		t.Fatal("ended with a client left")
	}
	l.closed()
	if !l.hasEnded() {
		t.Fatal("still alive without a client")
	}
	l.end("a second reason")
	if l.reason != "the last client has left" {
		t.Errorf("reason: %s", l.reason)
	}
}

func TestLifeEndsWhenNobodyComes(t *testing.T) {
	l := newLife()
	l.expectClient(time.Millisecond)
	select {
	case <-l.ended:
	case <-time.After(10 * time.Second):
		t.Fatal("still alive after the idle timeout")
	}
}

func TestFirstClientStopsTheIdleTimer(t *testing.T) {
	l := newLife()
	l.expectClient(20 * time.Millisecond)
	l.opened()
	time.Sleep(60 * time.Millisecond)
	if l.hasEnded() {
		t.Error("the idle timeout ended a daemon that has a client")
	}
	early := newLife()
	early.opened()
	early.expectClient(time.Nanosecond)
	time.Sleep(20 * time.Millisecond)
	if early.hasEnded() {
		t.Error("a client that came before the timer was set does not count")
	}
}

func TestInterruptIsForClientsToDecide(t *testing.T) {
	l := newLife()
	l.opened()
	l.interrupt()
	if l.hasEnded() {
		t.Error("Ctrl+C ended a daemon that has a client")
	}
	alone := newLife()
	alone.interrupt()
	if !alone.hasEnded() {
		t.Error("Ctrl+C did not end a daemon without clients")
	}
}
