package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vmihailenco/msgpack/v5"
	"github.com/vmihailenco/msgpack/v5/msgpcode"
	"google.golang.org/protobuf/encoding/protowire"
)

// sink counts records and bytes on the wire.
type sink struct {
	addr           string
	records, bytes atomic.Int64
	close          func()
}

// newSink starts the server for bulk, otlp or forward; null has one that nobody
// calls. Its owner closes it; the end of ctx only breaks connections.
func newSink(ctx context.Context, to string) (*sink, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s := &sink{addr: l.Addr().String()}
	var serving sync.WaitGroup
	if to == "forward" {
		ctx, cancel := context.WithCancel(ctx)
		s.close = func() { cancel(); _ = l.Close(); serving.Wait() }
		serving.Go(func() { s.forward(ctx, l) })
		return s, nil
	}
	handler := s.bulk
	if to == "otlp" {
		handler = s.otlp
	}
	server := &http.Server{Handler: http.HandlerFunc(handler), ReadHeaderTimeout: time.Minute}
	s.close = func() { _ = server.Close(); serving.Wait() }
	serving.Go(func() { _ = server.Serve(l) }) // it says that it was closed
	return s, nil
}

// unzipped are readers to use again: making one costs more than a request.
var unzipped = sync.Pool{New: func() any { return new(gzip.Reader) }}

// read calls f with the body, without gzip.
func (s *sink) read(r *http.Request, f func(io.Reader) error) error {
	counted := &counting{r: r.Body, n: &s.bytes}
	if r.Header.Get("Content-Encoding") != "gzip" {
		return f(counted)
	}
	z, ok := unzipped.Get().(*gzip.Reader)
	if !ok {
		return errors.New("the pool holds something else")
	}
	defer unzipped.Put(z)
	if err := z.Reset(counted); err != nil {
		return err
	}
	return f(z)
}

type counting struct {
	r io.Reader
	n *atomic.Int64
}

func (c *counting) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n.Add(int64(n))
	return n, err
}

// bulk answers as Elasticsearch does when it has created all documents. It has to
// know how many there are, so it counts lines; it looks at none.
func (s *sink) bulk(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Elastic-Product", "Elasticsearch")
	w.Header().Set("Content-Type", "application/json")
	if !strings.HasSuffix(r.URL.Path, "/_bulk") {
		_, _ = io.WriteString(w, `{"acknowledged":true,"version":{"number":"8.19.7"}}`) // the collector may be gone
		return
	}
	lines := 0
	err := s.read(r, func(body io.Reader) error {
		buffer := make([]byte, 64<<10)
		for {
			n, err := body.Read(buffer)
			lines += bytes.Count(buffer[:n], []byte{'\n'})
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return err
			}
		}
	})
	if err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	s.records.Add(int64(lines / 2))
	_, _ = w.Write(created(answer{lines / 2, r.URL.Query().Has("filter_path")})) // the collector may be gone
}

var answers sync.Map // answer -> []byte

// answer is to how many items, and whether it was asked to say no more than their
// status: Elasticsearch does as filter_path says, and all who use it ask for that.
type answer struct {
	items    int
	filtered bool
}

func created(a answer) []byte {
	if b, ok := answers.Load(a); ok {
		return b.([]byte) // nothing else is in it
	}
	item := []byte(`{"create":{"_index":".ds-logs-generic-default-000001","status":201}}`)
	b := []byte(`{"took":1,"errors":false,"items":[`)
	if a.filtered {
		item, b = []byte(`{"create":{"status":201}}`), []byte(`{"errors":false,"items":[`)
	}
	for i := range a.items {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, item...)
	}
	b = append(b, "]}"...)
	answers.Store(a, b)
	return b
}

func (s *sink) otlp(w http.ResponseWriter, r *http.Request) {
	var records int64
	err := s.read(r, func(body io.Reader) error {
		b, err := io.ReadAll(body)
		if err != nil {
			return err
		}
		return fields(b, 1, func(b []byte) error { // resource_logs
			return fields(b, 2, func(b []byte) error { // scope_logs
				return fields(b, 2, func([]byte) error { records++; return nil }) // log_records
			})
		})
	})
	if err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	s.records.Add(records)
	w.Header().Set("Content-Type", "application/x-protobuf")
}

var errProtobuf = errors.New("this is no ExportLogsServiceRequest")

// fields calls f with each field of the message that has the number and is of
// bytes.
func fields(b []byte, number protowire.Number, f func([]byte) error) error {
	for len(b) > 0 {
		n, t, size := protowire.ConsumeTag(b)
		if size < 0 {
			return errProtobuf
		}
		b = b[size:]
		if size = protowire.ConsumeFieldValue(n, t, b); size < 0 {
			return errProtobuf
		}
		if n == number && t == protowire.BytesType {
			v, _ := protowire.ConsumeBytes(b)
			if err := f(v); err != nil {
				return err
			}
		}
		b = b[size:]
	}
	return nil
}

func (s *sink) forward(ctx context.Context, l net.Listener) {
	var serving sync.WaitGroup
	defer serving.Wait()
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		stop := context.AfterFunc(ctx, func() { _ = c.Close() }) // that is the purpose
		serving.Go(func() {
			defer stop()
			defer func() { _ = c.Close() }() // it is over
			_ = s.session(c)                 // the client hung up
		})
	}
}

// session counts messages of all modes of the forward protocol, and acknowledges
// them.
func (s *sink) session(c net.Conn) error {
	d := msgpack.NewDecoder(bufio.NewReaderSize(&counting{r: c, n: &s.bytes}, 256<<10))
	for {
		n, err := d.DecodeArrayLen()
		if err != nil {
			return err
		}
		if err := d.Skip(); err != nil { // tag
			return err
		}
		code, err := d.PeekCode()
		if err != nil {
			return err
		}
		records, used := 1, 2
		switch {
		case msgpcode.IsBin(code) || msgpcode.IsString(code): // entries, their number is in the options
			err = d.Skip()
		case msgpcode.IsFixedArray(code) || code == msgpcode.Array16 || code == msgpcode.Array32:
			if records, err = d.DecodeArrayLen(); err == nil {
				for range records {
					err = errors.Join(err, d.Skip())
				}
			}
		default: // time and record
			err = errors.Join(d.Skip(), d.Skip())
			used = 3
		}
		if err != nil {
			return err
		}
		var options struct {
			Chunk string `msgpack:"chunk"`
			Size  int    `msgpack:"size"`
		}
		if n > used {
			if err := d.Decode(&options); err != nil {
				return err
			}
		}
		if used == 2 && options.Size > 0 {
			records = options.Size
		}
		s.records.Add(int64(records))
		if options.Chunk != "" {
			answer := append([]byte{0x81, 0xa3, 'a', 'c', 'k', 0xd9, byte(len(options.Chunk))}, options.Chunk...)
			if len(options.Chunk) > 255 {
				return errors.New("chunk " + strconv.Quote(options.Chunk) + " is too long")
			}
			if _, err := c.Write(answer); err != nil {
				return err
			}
		}
	}
}
