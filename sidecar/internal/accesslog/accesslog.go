// Package accesslog writes one JSON line a request, with Elastic Common Schema
// names, in the form that the collector recognises.
//
// It knows the form of the line and the queue to the writer. A request never
// waits for its log line: a full queue drops the line and counts it. Lines are
// built in pooled buffers without reflection.
package accesslog

import (
	"context"
	"io"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Queue is how many lines may wait for the writer.
const Queue = 4096

// How much of what a stranger wrote is logged: a head may hold 64 KiB, and the
// lines of a full queue must fit into memory.
const (
	maxPath = 1024
	maxText = 256 // of every other field
)

// Entry is what is known of a request when it has ended. Byte slices may alias
// a connection's buffer: Write copies.
type Entry struct {
	Start       time.Time
	Duration    time.Duration
	Direction   string // outbound or inbound
	Protocol    string // http or tcp
	Method      []byte
	Path        []byte // without the query: it may hold secrets
	Host        []byte
	UserAgent   []byte
	RequestID   []byte
	Status      int
	Flags       Flags
	Destination string // <namespace>/<service>:<port>
	Route       string
	Upstream    string // address of the endpoint
	ServerName  string // that a TLS client asked for
	Source      string // address of the caller
	Attempts    int
	BytesIn     int64 // of the request's body
	BytesOut    int64 // of the response's body
	TraceID     []byte
	SpanID      []byte
	ParentID    []byte
	Breaker     string // policy that rejected, or would have
	Detail      string // why, for local replies
	Config      string // version of the configuration
}

// Log is the queue to one writer. It is safe for concurrent use.
type Log struct {
	node    []byte // the fields that are the same on every line
	lines   chan *[]byte
	buffers sync.Pool
	dropped atomic.Uint64
	failed  atomic.Uint64
}

// New makes a Log whose lines say that they come from the workload given.
func New(namespace, workload, instance string) *Log {
	l := &Log{lines: make(chan *[]byte, Queue)}
	l.buffers.New = func() any { b := make([]byte, 0, 1024); return &b }
	n := appendField(nil, record.ServiceName, workload)
	n = appendField(n, "service.namespace", namespace)
	l.node = appendField(n, "service.node.name", instance)
	return l
}

// Dropped is how many lines a full queue has cost; Failed how many the writer
// refused.
func (l *Log) Dropped() uint64 { return l.dropped.Load() }

// Failed is how many lines the writer refused.
func (l *Log) Failed() uint64 { return l.failed.Load() }

// Run writes the lines to w until ctx ends, then what is still queued. It is the
// only writer.
func (l *Log) Run(ctx context.Context, w io.Writer) error {
	write := func(b *[]byte) {
		if _, err := w.Write(*b); err != nil {
			l.failed.Add(1)
		}
		*b = (*b)[:0]
		l.buffers.Put(b)
	}
	for {
		select {
		case b := <-l.lines:
			write(b)
		case <-ctx.Done():
			for {
				select {
				case b := <-l.lines:
					write(b)
				default:
					return ctx.Err()
				}
			}
		}
	}
}

func (l *Log) enqueue(b *[]byte) {
	select {
	case l.lines <- b:
	default:
		l.dropped.Add(1)
		*b = (*b)[:0]
		l.buffers.Put(b)
	}
}

// Write logs a request.
func (l *Log) Write(e *Entry) {
	bp, ok := l.buffers.Get().(*[]byte)
	if !ok {
		return
	}
	b := append(*bp, `{"@timestamp":"`...)
	b = e.Start.UTC().AppendFormat(b, "2006-01-02T15:04:05.000000Z")
	b = append(b, '"')
	level := "info"
	if e.Status >= 500 || e.Flags != 0 {
		level = "warn"
	}
	b = appendField(b, record.LogLevel, level)
	b = append(b, `,"message":"`...)
	b = appendMessage(b, e)
	b = append(b, '"')
	b = appendField(b, record.EventDataset, record.DatasetAccess)
	b = append(b, l.node...)
	b = appendField(b, "outrigger.direction", e.Direction)
	b = appendField(b, "network.protocol", e.Protocol)
	if len(e.Method) > 0 {
		b = appendBytes(b, "http.request.method", e.Method)
		b = append(appendEscaped(append(b, `,"url.path":"`...), e.Path[:min(len(e.Path), maxPath)]), '"')
		b = appendBytes(b, "url.domain", e.Host)
	}
	if len(e.UserAgent) > 0 {
		b = appendBytes(b, "user_agent.original", e.UserAgent)
	}
	if len(e.RequestID) > 0 {
		b = appendBytes(b, "http.request.id", e.RequestID)
	}
	if e.Protocol == "http" {
		b = appendInt(b, "http.response.status_code", int64(e.Status))
	}
	b = appendField(b, "outrigger.response_flags", e.Flags.String())
	b = appendInt(b, "event.duration", int64(e.Duration))
	b = appendInt(b, "http.request.body.bytes", e.BytesIn)
	b = appendInt(b, "http.response.body.bytes", e.BytesOut)
	b = appendField(b, "outrigger.destination", e.Destination)
	b = appendNonEmpty(b, "outrigger.route", e.Route)
	b = appendNonEmpty(b, "destination.address", e.Upstream)
	b = appendNonEmpty(b, "source.address", e.Source)
	b = appendNonEmpty(b, "tls.client.server_name", e.ServerName)
	b = appendInt(b, "outrigger.attempts", int64(e.Attempts))
	if len(e.TraceID) > 0 {
		b = appendBytes(b, record.TraceID, e.TraceID)
		b = appendBytes(b, record.SpanID, e.SpanID)
	}
	if len(e.ParentID) > 0 {
		b = appendBytes(b, "parent.id", e.ParentID)
	}
	b = appendNonEmpty(b, "outrigger.breaker.policy", e.Breaker)
	b = appendNonEmpty(b, "error.message", e.Detail)
	b = appendNonEmpty(b, "outrigger.config_version", e.Config)
	b = append(b, "}\n"...)
	*bp = b
	l.enqueue(bp)
}

// WriteRaw logs a line that is JSON already; fields must begin with '{' and end
// with '}'. What names the node is added.
func (l *Log) WriteRaw(object []byte) {
	bp, ok := l.buffers.Get().(*[]byte)
	if !ok || len(object) < 2 {
		return
	}
	b := append(*bp, object[:len(object)-1]...)
	b = append(b, l.node...)
	*bp = append(b, "}\n"...)
	l.enqueue(bp)
}

// appendMessage writes what a person reads first: GET /pay -> 503 UO 1.2ms.
func appendMessage(b []byte, e *Entry) []byte {
	if len(e.Method) > 0 {
		b = appendEscaped(b, e.Method)
		b = append(b, ' ')
		b = appendEscaped(b, e.Path[:min(len(e.Path), 128)])
	} else {
		b = append(b, e.Protocol...)
	}
	b = append(b, " -> "...)
	if e.Protocol == "http" {
		b = strconv.AppendInt(b, int64(e.Status), 10)
	}
	if e.Flags != 0 {
		b = append(append(b, ' '), e.Flags.String()...)
	}
	b = append(b, ' ')
	b = strconv.AppendFloat(b, float64(e.Duration)/1e6, 'f', 1, 64)
	return append(b, "ms"...)
}

func appendField(b []byte, name, value string) []byte {
	b = append(append(append(b, `,"`...), name...), `":"`...)
	for i := range len(value) {
		b = appendByte(b, value[i])
	}
	return append(b, '"')
}

func appendNonEmpty(b []byte, name, value string) []byte {
	if value == "" {
		return b
	}
	return appendField(b, name, value)
}

func appendBytes(b []byte, name string, value []byte) []byte {
	b = append(append(append(b, `,"`...), name...), `":"`...)
	return append(appendEscaped(b, value[:min(len(value), maxText)]), '"')
}

func appendInt(b []byte, name string, v int64) []byte {
	b = append(append(append(b, `,"`...), name...), `":`...)
	return strconv.AppendInt(b, v, 10)
}

// appendEscaped writes bytes from a stranger as the inside of a JSON string
// (RFC 8259, 7). What is not UTF-8 becomes U+FFFD.
func appendEscaped(b, v []byte) []byte {
	for len(v) > 0 {
		if v[0] < utf8.RuneSelf {
			b = appendByte(b, v[0])
			v = v[1:]
			continue
		}
		r, n := utf8.DecodeRune(v)
		b = utf8.AppendRune(b, r)
		v = v[n:]
	}
	return b
}

func appendByte(b []byte, c byte) []byte {
	const hex = "0123456789abcdef"
	switch {
	case c == '"' || c == '\\':
		return append(b, '\\', c)
	case c < 0x20 || c == 0x7f:
		return append(b, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
	}
	return append(b, c)
}
