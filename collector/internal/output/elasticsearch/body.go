package elasticsearch

import (
	"bytes"
	"errors"
	"io"
	"sync"
)

// body lends the encoder's memory to a request. The transport may go on reading
// the body of a request that has been answered or given up, so the memory is
// taken back before it is used again; a late reader gets an error.
type body struct {
	mu   sync.Mutex
	data []byte
}

var errTakenBack = errors.New("the request is over")

// reader returns a reader from the start.
func (b *body) reader() (io.ReadCloser, error) { return &bodyReader{body: b}, nil }

// takeBack ends all reads.
func (b *body) takeBack() {
	b.mu.Lock()
	b.data = nil
	b.mu.Unlock()
}

type bodyReader struct {
	body *body
	at   int
}

func (r *bodyReader) Read(p []byte) (int, error) {
	r.body.mu.Lock()
	defer r.body.mu.Unlock()
	if r.body.data == nil {
		return 0, errTakenBack
	}
	n := copy(p, r.body.data[r.at:])
	if r.at += n; r.at == len(r.body.data) {
		return n, io.EOF
	}
	return n, nil
}

func (*bodyReader) Close() error { return nil }

// readAll reads at most limit bytes into buf and reports whether that was all.
func readAll(buf *bytes.Buffer, r io.Reader, limit int64) (all bool, err error) {
	buf.Reset()
	n, err := buf.ReadFrom(io.LimitReader(r, limit+1))
	return n <= limit, err
}
