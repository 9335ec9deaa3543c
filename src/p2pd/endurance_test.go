package main

import (
	"runtime"
	"sync"
	"testing"
	"time"
)

// inUse counts goroutines and bytes on the heap once nothing is left for the collector.
func inUse() (goroutines int, heap uint64) {
	var m runtime.MemStats
	for range 3 { // pools are emptied by the second collection
		runtime.GC()
	}
	runtime.ReadMemStats(&m)
	return runtime.NumGoroutine(), m.HeapAlloc
}

// TestCallsLeaveNothingBehind makes 10,000 calls between two daemons of this process.
func TestCallsLeaveNothingBehind(t *testing.T) {
	const (
		calls     = 10_000
		atOnce    = 50
		slackHeap = 2 << 20 // maps keep their buckets, libp2p its counters of peers
	)
	caller, handler, callee := twoSessions(t, "-dhtServer=1", "-connManager=1")
	go handler.echo()
	data := make([]byte, 4096)
	run := func(count int) {
		var wg sync.WaitGroup
		for range atOnce {
			wg.Go(func() {
				for range count / atOnce {
					if _, err := caller.call(callee, proto, data); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
	}
	run(1000) // what is made once, and kept, is made here
	time.Sleep(time.Second)
	goroutines, heap := inUse()
	run(calls)
	deadline := time.Now().Add(patience)
	for {
		nowGoroutines, nowHeap := inUse()
		if nowGoroutines <= goroutines && nowHeap <= heap+slackHeap {
			t.Logf("goroutines %d, then %d; heap %d KiB, then %d KiB", goroutines, nowGoroutines, heap>>10, nowHeap>>10)
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("goroutines %d, then %d; heap %d KiB, then %d KiB", goroutines, nowGoroutines, heap>>10, nowHeap>>10)
		}
		time.Sleep(100 * time.Millisecond)
	}
}
