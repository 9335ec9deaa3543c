package main

// Frames: an unsigned varint length and that many bytes, on control sockets and on libp2p streams alike.

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	pool "github.com/libp2p/go-buffer-pool"
	"google.golang.org/protobuf/encoding/protowire"
)

var errFrameTooLong = errors.New("message exceeds the size limit")

// A length prefix is a promise of the sender only. Memory grows with what has arrived: a frame above firstChunk gets
// a buffer growthFactor times larger each time the last one is full, so that copies stay below a sixth of the bytes.
const (
	firstChunk   = 64 << 10
	growthFactor = 8
)

// readerSize is enough for a decode step's hidden state with its envelope in one read; what does not fit is read
// straight into the frame.
const readerSize = 8 << 10

var readers = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, readerSize) }}

func takeReader(r io.Reader) *bufio.Reader {
	br := readers.Get().(*bufio.Reader)
	br.Reset(r)
	return br
}

func giveReader(br *bufio.Reader) {
	br.Reset(nil)
	readers.Put(br)
}

// frame is a received frame, kept with its prefix so that it can be sent on as it is.
type frame struct {
	buf  []byte // from the buffer pool
	body int    // where the payload starts in buf
}

func (f frame) payload() []byte { return f.buf[f.body:] }

// whole is the frame as it goes over a wire.
func (f frame) whole() []byte { return f.buf }

// release gives the memory back; no slice of the frame may be used after it.
func (f frame) release() { pool.Put(f.buf) }

// readFrame reads one frame whose payload is at most limit bytes. It returns io.EOF only when the stream ended between
// frames. The caller owns the frame and must release it.
func readFrame(r *bufio.Reader, limit int) (frame, error) {
	length, err := binary.ReadUvarint(r)
	if err != nil {
		return frame{}, err
	}
	if length > uint64(limit) {
		return frame{}, fmt.Errorf("%w: %d bytes announced, %d allowed", errFrameTooLong, length, limit)
	}
	prefix := protowire.SizeVarint(length)
	total := prefix + int(length)
	buf := pool.Get(min(total, firstChunk))
	filled := len(binary.AppendUvarint(buf[:0], length))
	for {
		if _, err := io.ReadFull(r, buf[filled:]); err != nil {
			pool.Put(buf)
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return frame{}, err
		}
		filled = len(buf)
		if filled == total {
			return frame{buf: buf, body: prefix}, nil
		}
		larger := pool.Get(min(total, growthFactor*filled))
		copy(larger, buf)
		pool.Put(buf)
		buf = larger
	}
}

// appendFrame appends a message to b with its length in front.
func appendFrame(b, message []byte) []byte {
	return protowire.AppendBytes(b, message)
}
