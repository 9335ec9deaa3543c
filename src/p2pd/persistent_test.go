package main

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"
)

const proto = "Test.call"

// twoSessions starts two connected daemons and a client of each: the first calls, the second handles.
func twoSessions(t testing.TB, args ...string) (caller, handler *session, callee *daemon) {
	t.Helper()
	from, to := startDaemon(t, args...), startDaemon(t, args...)
	connectDaemons(t, from, to)
	caller, handler = upgrade(t, from), upgrade(t, to)
	if err := handler.add(proto, false); err != nil {
		t.Fatal(err)
	}
	return caller, handler, to
}

func TestCallsReachTheHandler(t *testing.T) {
	caller, handler, callee := twoSessions(t)
	go handler.echo()
	for _, size := range []int{0, 1, 4096, 300_000, 4<<20 - 200} {
		data := bytes.Repeat([]byte{7}, size)
		answer, err := caller.call(callee, proto, data)
		if err != nil || !bytes.Equal(answer, data) {
			t.Errorf("%d bytes: %d came back, %v", size, len(answer), err)
		}
	}
}

func TestHandlerSeesWhoCalls(t *testing.T) {
	caller, handler, callee := twoSessions(t)
	// The peer in the request is the callee's; what a caller writes there must not reach the handler.
	_, replies, err := caller.start(fieldCallUnary, callContent(string(callee.host.ID()), proto, []byte("x")))
	if err != nil {
		t.Fatal(err)
	}
	id, call := handler.next()
	if string(call.peer) != string(caller.d.host.ID()) || call.proto != proto {
		t.Errorf("%+v", call)
	}
	if err := handler.answer(id, nil); err != nil {
		t.Fatal(err)
	}
	answer, err := decode((<-replies).bytes[fieldCallUnaryResponse][0])
	if err != nil || answer.bytes[1] == nil || len(answer.bytes[1][0]) != 0 {
		t.Errorf("an empty answer must be there, and empty: %v, %v", answer, err)
	}
}

func TestErrorOfTheHandlerIsNotTouched(t *testing.T) {
	caller, handler, callee := twoSessions(t)
	_, replies, err := caller.start(fieldCallUnary, callContent(string(callee.host.ID()), proto, nil))
	if err != nil {
		t.Fatal(err)
	}
	id, _ := handler.next()
	said := []byte("ValueError('\xff')")
	if err := handler.say(id, fieldUnaryResponse, appendBytes(nil, 2, said)); err != nil {
		t.Fatal(err)
	}
	answer, err := decode((<-replies).bytes[fieldCallUnaryResponse][0])
	if err != nil || !bytes.Equal(answer.bytes[2][0], said) {
		t.Errorf("%v, %v", answer, err)
	}
}

func TestCallErrors(t *testing.T) {
	caller, _, callee := twoSessions(t)
	stranger := startDaemon(t)
	for name, content := range map[string][]byte{
		"no such handler": callContent(string(callee.host.ID()), "nobody", nil),
		"unknown peer":    callContent(string(stranger.host.ID()), proto, nil),
		"itself":          callContent(string(caller.d.host.ID()), proto, nil),
		"bad peer":        callContent("not a peer", proto, nil),
	} {
		var says daemonSays
		err := daemonErrorOf(caller.do(fieldCallUnary, content))
		if !errors.As(err, &says) || says == "" || strings.Contains(string(says), "\n") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRegistration(t *testing.T) {
	d := startDaemon(t)
	first, second := upgrade(t, d), upgrade(t, d)
	for _, step := range []struct {
		name string
		do   func() error
		want error
	}{
		{"first", func() error { return first.add("p", false) }, nil},
		{"duplicate", func() error { return second.add("p", false) }, errHandlerExists},
		{"foreign", func() error { return second.remove("p") }, errHandlerForeign},
		{"balanced joins", func() error { return second.add("p", true) }, nil},
		{"unknown", func() error { return first.remove("q") }, errHandlerUnknown},
		{"remove", func() error { return first.remove("p") }, nil},
		{"remove again", func() error { return first.remove("p") }, errHandlerForeign},
	} {
		err := step.do()
		if step.want == nil && err != nil || step.want != nil && (err == nil || err.Error() != step.want.Error()) {
			t.Errorf("%s: %v", step.name, err)
		}
	}
	second.close()
	deadline := time.Now().Add(patience)
	for d.unary.pick("p") != nil {
		if time.Now().After(deadline) {
			t.Fatal("a client that has gone keeps its handler")
		}
		time.Sleep(time.Millisecond)
	}
}

func TestCancelReachesTheHandler(t *testing.T) {
	caller, handler, callee := twoSessions(t)
	id, replies, err := caller.start(fieldCallUnary, callContent(string(callee.host.ID()), proto, nil))
	if err != nil {
		t.Fatal(err)
	}
	served, _ := handler.next()
	if served != id {
		t.Error("the handler must see the caller's call ID")
	}
	if err := caller.say(id, fieldCancelRequest, nil); err != nil {
		t.Fatal(err)
	}
	select {
	case reply := <-replies:
		if reply.bytes[fieldCancelResponse] == nil {
			t.Errorf("got %v", reply)
		}
	case <-time.After(patience):
		t.Fatal("no reply to the cancellation")
	}
	select {
	case got := <-handler.cancels:
		if got != id {
			t.Error("another call was cancelled")
		}
	case <-time.After(patience):
		t.Fatal("the handler does not know")
	}
	// Too late, and harmless.
	if err := handler.answer(id, []byte("late")); err != nil {
		t.Fatal(err)
	}
	go handler.echo()
	if _, err := caller.call(callee, proto, nil); err != nil {
		t.Error(err)
	}
}

func TestCallIDInUse(t *testing.T) {
	caller, handler, callee := twoSessions(t)
	content := callContent(string(callee.host.ID()), proto, []byte("x"))
	id, replies, err := caller.start(fieldCallUnary, content)
	if err != nil {
		t.Fatal(err)
	}
	handler.next()
	if err := caller.say(id, fieldCallUnary, content); err != nil {
		t.Fatal(err)
	}
	if err := daemonErrorOf(<-replies, nil); err == nil || err.Error() != errCallIDInUse.Error() {
		t.Errorf("a second call under the same ID: %v", err)
	}
	if err := handler.answer(id, []byte("x")); err != nil {
		t.Fatal(err)
	}
	if reply := <-replies; reply.bytes[fieldCallUnaryResponse] == nil {
		t.Errorf("the first call must end as usual: %v", reply)
	}
}

func TestFramesThatAreForNobody(t *testing.T) {
	s := upgrade(t, startDaemon(t))
	for name, message := range map[string][]byte{
		"ID too short":        appendBytes(appendBytes(nil, 1, make([]byte, 15)), fieldCancelRequest, nil),
		"ID too long":         appendBytes(appendBytes(nil, 1, make([]byte, 17)), fieldCancelRequest, nil),
		"unknown cancel":      persistentResponse(callID{1}, fieldCancelRequest, nil),
		"unknown answer":      persistentResponse(callID{1}, fieldUnaryResponse, appendBytes(nil, 1, nil)),
		"empty oneof":         persistentResponse(callID{1}, 0, nil),
		"field of the future": persistentResponse(callID{1}, 99, []byte("x")),
	} {
		if err := s.send(message); err != nil {
			t.Fatal(err)
		}
		if err := s.add(name, false); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCallsEndWithTheHandlersClient(t *testing.T) {
	caller, handler, callee := twoSessions(t)
	_, replies, err := caller.start(fieldCallUnary, callContent(string(callee.host.ID()), proto, nil))
	if err != nil {
		t.Fatal(err)
	}
	handler.next()
	handler.close()
	select {
	case reply := <-replies:
		if err := daemonErrorOf(reply, nil); err == nil {
			t.Errorf("got %v", reply)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("the caller is left waiting")
	}
}

func TestCallsEndWithTheCallersClient(t *testing.T) {
	caller, handler, callee := twoSessions(t)
	id, _, err := caller.start(fieldCallUnary, callContent(string(callee.host.ID()), proto, nil))
	if err != nil {
		t.Fatal(err)
	}
	handler.next()
	caller.close()
	select {
	case got := <-handler.cancels:
		if got != id {
			t.Error("another call was cancelled")
		}
	case <-time.After(patience):
		t.Fatal("the handler works for nobody")
	}
}

func TestMessagesOverTheLimit(t *testing.T) {
	caller, handler, callee := twoSessions(t, "-persistentConnMaxMsgSize=5000")
	go handler.echo()
	if _, err := caller.call(callee, proto, make([]byte, 4000)); err != nil {
		t.Fatal(err)
	}
	if _, err := caller.call(callee, proto, make([]byte, 6000)); err == nil {
		t.Error("a call over the limit went through")
	}
	select {
	case <-caller.ended: // as for every frame over the limit
	case <-time.After(patience):
		t.Error("the connection is still open")
	}
}

func TestManyCallsAtOnce(t *testing.T) {
	caller, handler, callee := twoSessions(t)
	go handler.echo()
	var wg sync.WaitGroup
	for i := range 1000 {
		wg.Go(func() {
			data := fmt.Appendf(nil, "call %d", i)
			if answer, err := caller.call(callee, proto, data); err != nil || !bytes.Equal(answer, data) {
				t.Errorf("call %d: %q, %v", i, answer, err)
			}
		})
	}
	wg.Wait()
}
