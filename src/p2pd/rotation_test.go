package main

import (
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
)

func nothing() {}

func turns(r *rotations[string], proto string, count int) string {
	var taken []string
	for range count {
		taken = append(taken, r.pick(proto)[0])
	}
	return strings.Join(taken, " ")
}

func TestRotationTakesTurns(t *testing.T) {
	var r rotations[string]
	for _, handler := range []string{"a", "b", "c"} {
		if err := r.add("p", handler, true, nothing); err != nil {
			t.Fatal(err)
		}
	}
	if got := turns(&r, "p", 7); got != "a b c a b c a" {
		t.Errorf("got %s", got)
	}
	// The turn is b's. Whoever goes, the others keep their order.
	if err := r.remove("p", "a", nothing); err != nil {
		t.Fatal(err)
	}
	if got := turns(&r, "p", 4); got != "b c b c" {
		t.Errorf("after a has gone: %s", got)
	}
	if got := r.pick("p"); !slices.Equal(got, []string{"b", "c"}) {
		t.Errorf("the others must follow the first: %v", got)
	}
}

func TestRotationAdds(t *testing.T) {
	var r rotations[string]
	first := 0
	count := func() { first++ }
	for _, step := range []struct {
		handler  string
		balanced bool
		want     error
	}{
		{"a", false, nil},
		{"b", false, errHandlerExists},
		{"b", true, nil}, // whatever the first one was
		{"a", true, nil}, // a second slot
		{"a", false, errHandlerExists},
	} {
		if err := r.add("p", step.handler, step.balanced, count); !errors.Is(err, step.want) {
			t.Errorf("%+v: %v", step, err)
		}
	}
	if first != 1 {
		t.Errorf("the protocol was registered %d times", first)
	}
	if got := turns(&r, "p", 6); got != "a b a a b a" {
		t.Errorf("got %s", got)
	}
}

func TestRotationRemoves(t *testing.T) {
	var r rotations[string]
	var gone []string
	for _, proto := range []string{"p", "q", "p"} {
		if err := r.add(proto, "a", true, nothing); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.add("q", "b", true, nothing); err != nil {
		t.Fatal(err)
	}
	if err := r.remove("unknown", "a", nothing); !errors.Is(err, errHandlerUnknown) {
		t.Errorf("unknown protocol: %v", err)
	}
	if err := r.remove("p", "b", nothing); !errors.Is(err, errHandlerForeign) {
		t.Errorf("foreign handler: %v", err)
	}
	r.removeAll("a", func(proto string) { gone = append(gone, proto) })
	if !slices.Equal(gone, []string{"p"}) {
		t.Errorf("protocols without handlers: %v", gone)
	}
	if r.pick("p") != nil || turns(&r, "q", 2) != "b b" {
		t.Error("a's slots must go, b's must stay")
	}
}

func TestRotationIsFairUnderConcurrency(t *testing.T) {
	const handlers, rounds = 3, 1000
	var r rotations[int]
	for i := range handlers {
		if err := r.add("p", i, true, nothing); err != nil {
			t.Fatal(err)
		}
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	taken := map[int]int{}
	for range handlers * rounds {
		wg.Go(func() {
			h := r.pick("p")[0]
			mu.Lock()
			defer mu.Unlock()
			taken[h]++
		})
	}
	wg.Wait()
	for i := range handlers {
		if taken[i] != rounds {
			t.Errorf("handler %d had %d turns of %d", i, taken[i], rounds)
		}
	}
}
