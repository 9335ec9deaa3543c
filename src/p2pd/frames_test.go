package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"runtime"
	"testing"
	"testing/iotest"
)

func TestFrameRoundTrip(t *testing.T) {
	for _, size := range []int{0, 1, 127, 128, 4096, firstChunk - 3, firstChunk - 2, firstChunk, 10*firstChunk + 7, 1 << 20} {
		message := bytes.Repeat([]byte{0xa5}, size)
		wire := appendFrame(nil, message)
		// Both as it comes and byte by byte: a frame does not have to arrive in one piece.
		for name, r := range map[string]io.Reader{"whole": bytes.NewReader(wire), "halves": iotest.HalfReader(bytes.NewReader(wire))} {
			f, err := readFrame(bufio.NewReaderSize(r, 16), 1<<20)
			if err != nil {
				t.Fatalf("%d bytes, %s: %v", size, name, err)
			}
			if !bytes.Equal(f.payload(), message) || !bytes.Equal(f.whole(), wire) {
				t.Errorf("%d bytes, %s: the frame has changed", size, name)
			}
			f.release()
		}
	}
}

func TestFrameErrors(t *testing.T) {
	const limit = 1000
	announce := func(length uint64) []byte { return binary.AppendUvarint(nil, length) }
	for _, test := range []struct {
		name string
		in   []byte
		want error
	}{
		{"nothing", nil, io.EOF},
		{"half a prefix", []byte{0x80}, io.ErrUnexpectedEOF},
		{"no payload", announce(5), io.ErrUnexpectedEOF},
		{"half a payload", append(announce(5), 1, 2), io.ErrUnexpectedEOF},
		{"one byte too long", announce(limit + 1), errFrameTooLong},
		{"2^40", announce(1 << 40), errFrameTooLong},
		{"2^63", announce(1 << 63), errFrameTooLong},
	} {
		_, err := readFrame(bufio.NewReader(bytes.NewReader(test.in)), limit)
		if !errors.Is(err, test.want) {
			t.Errorf("%s: got %v, want %v", test.name, err, test.want)
		}
	}
	if _, err := readFrame(bufio.NewReader(bytes.NewReader(bytes.Repeat([]byte{0xff}, 11))), limit); err == nil {
		t.Error("a prefix of more than 64 bits was accepted")
	}
	f, err := readFrame(bufio.NewReader(bytes.NewReader(append(announce(limit), make([]byte, limit)...))), limit)
	if err != nil {
		t.Fatalf("exactly the limit: %v", err)
	}
	f.release()
}

// allocated returns the bytes taken from the heap while f runs.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

func TestLengthIsRefusedBeforeAllocation(t *testing.T) {
	const enough = 64 << 10
	for _, length := range []uint64{1 << 23, 1 << 32, 1 << 40, 1<<64 - 1} {
		r := bufio.NewReader(bytes.NewReader(binary.AppendUvarint(nil, length)))
		var err error
		if taken := allocated(func() { _, err = readFrame(r, 4<<20) }); taken > enough {
			t.Errorf("%d bytes announced: %d allocated", length, taken)
		}
		if !errors.Is(err, errFrameTooLong) {
			t.Errorf("%d bytes announced: %v", length, err)
		}
	}
}

func TestMemoryGrowsWithWhatHasArrived(t *testing.T) {
	const limit = 1 << 30
	in := append(binary.AppendUvarint(nil, limit), make([]byte, 1000)...)
	var err error
	taken := allocated(func() { _, err = readFrame(bufio.NewReader(bytes.NewReader(in)), limit) })
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatal(err)
	}
	if taken > 2*firstChunk {
		t.Errorf("%d bytes allocated for 1000 of the announced %d", taken, limit)
	}
}
