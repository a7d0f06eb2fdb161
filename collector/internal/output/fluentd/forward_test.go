package fluentd

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha512"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	kgzip "github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/vmihailenco/msgpack/v5"

	"github.com/outrigger-mesh/outrigger/collector/internal/output"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// forwardServer is a stand-in for a forward server, strict about PackedForward,
// its compressed forms and the handshake of the forward protocol v1, that can fail
// as a test says.
type forwardServer struct {
	t  *testing.T
	ln net.Listener

	// Set before the first connection.
	compressed string            // every chunk must be
	key        string            // shared key; empty: no handshake
	users      map[string]string // with passwords; nil: none are asked for
	liar       bool              // knows no shared key itself
	lenient    bool              // the client is expected to break the protocol
	noKeep     bool              // closes after every chunk
	announce   bool              // says so in its greeting

	wg     sync.WaitGroup
	mu     sync.Mutex
	answer func(n int, c received) any // nil: no answer; n counts chunks from 0
	conns  map[net.Conn]struct{}
	chunks []received
	opened int
}

type received struct {
	tag    string
	id     string
	bytes  int
	events []event
}

// several acknowledges chunks by their ids, in that order.
type several []string

func takes(_ int, c received) any { return several{c.id} }

func startForward(t *testing.T, s *forwardServer) *forwardServer {
	t.Helper()
	s.t = t
	if s.ln == nil {
		s.ln = listen(t)
	}
	if s.answer == nil {
		s.answer = takes
	}
	s.conns = map[net.Conn]struct{}{}
	s.wg.Go(func() {
		for {
			conn, err := s.ln.Accept()
			if err != nil {
				return
			}
			s.mu.Lock()
			s.conns[conn] = struct{}{}
			s.opened++
			s.mu.Unlock()
			s.wg.Go(func() { s.serve(conn) })
		}
	})
	t.Cleanup(s.stop)
	return s
}

func (s *forwardServer) stop() {
	_ = s.ln.Close()
	s.mu.Lock()
	for c := range s.conns {
		_ = c.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
}

func (s *forwardServer) serve(conn net.Conn) {
	defer func() { _ = conn.Close() }()
	enc, dec := msgpack.NewEncoder(conn), msgpack.NewDecoder(conn)
	if s.key != "" {
		if !s.admit(enc, dec) {
			return
		}
	}
	for {
		c, err := s.readChunk(dec)
		if err != nil {
			var network net.Error
			if !s.lenient && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) && !errors.As(err, &network) {
				s.t.Errorf("the client sent: %v", err)
			}
			return
		}
		s.mu.Lock()
		n := len(s.chunks)
		s.chunks = append(s.chunks, c)
		decide := s.answer
		s.mu.Unlock()
		switch answer := decide(n, c).(type) {
		case nil:
		case closeConn:
			return
		case several:
			for _, id := range answer {
				if err := enc.Encode(map[string]any{"ack": id}); err != nil {
					return
				}
			}
		default:
			if err := enc.Encode(answer); err != nil {
				return
			}
		}
		if s.noKeep {
			return
		}
	}
}

func sum(parts ...string) string {
	h := sha512.Sum512([]byte(strings.Join(parts, "")))
	return hex.EncodeToString(h[:])
}

// admit is the server's side of the handshake, with nonces that are no text.
func (s *forwardServer) admit(enc *msgpack.Encoder, dec *msgpack.Decoder) bool {
	nonce, salt := "\xff\x00nonce", ""
	if s.users != nil {
		salt = "\xfesalt"
	}
	if err := enc.Encode([]any{"HELO", map[string]any{"nonce": []byte(nonce), "auth": []byte(salt), "keepalive": !s.announce}}); err != nil {
		return false
	}
	v, err := dec.DecodeInterface()
	ping, ok := v.([]any)
	if err != nil || !ok || len(ping) != 6 || ping[0] != "PING" {
		if !s.lenient {
			s.t.Errorf("PING: %v, %v", v, err)
		}
		return false
	}
	var p [6]string
	for i, x := range ping {
		p[i], _ = x.(string)
	}
	reason := ""
	switch {
	case p[3] != sum(p[2], p[1], nonce, s.key):
		reason = "shared_key mismatch"
	case s.users == nil && p[4]+p[5] != "":
		reason = "nobody asked for a user"
	case s.users != nil && p[5] != sum(salt, p[4], s.users[p[4]]):
		reason = "username/password mismatch"
	}
	key := s.key
	if s.liar {
		key = "another"
	}
	if err := enc.Encode([]any{"PONG", reason == "", reason, "peer", sum(p[2], "peer", nonce, key)}); err != nil {
		return false
	}
	return reason == ""
}

// readChunk reads [tag, binary, {"size", "chunk", "compressed"}] and nothing else.
func (s *forwardServer) readChunk(dec *msgpack.Decoder) (c received, err error) {
	n, err := dec.DecodeArrayLen()
	if err != nil {
		return c, err
	}
	if n != 3 {
		return c, fmt.Errorf("an array of %d; want tag, entries, option", n)
	}
	if c.tag, err = dec.DecodeString(); err != nil {
		return c, fmt.Errorf("tag: %w", err)
	}
	entries, err := dec.DecodeBytes()
	if err != nil {
		return c, fmt.Errorf("entries: %w", err)
	}
	option, err := dec.DecodeMap()
	if err != nil {
		return c, fmt.Errorf("option: %w", err)
	}
	c.id, _ = option["chunk"].(string)
	if compressed, _ := option["compressed"].(string); c.id == "" || compressed != s.compressed {
		return c, fmt.Errorf("option %v", option)
	}
	switch s.compressed {
	case "gzip":
		r, err := gzip.NewReader(bytes.NewReader(entries))
		if err != nil {
			return c, err
		}
		if entries, err = io.ReadAll(r); err != nil {
			return c, err
		}
	case "zstd":
		r, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1))
		if err != nil {
			return c, err
		}
		defer r.Close()
		if entries, err = r.DecodeAll(entries, nil); err != nil {
			return c, err
		}
	}
	c.bytes = len(entries)
	if c.events, err = readEntries(entries); err != nil {
		return c, err
	}
	if got := fmt.Sprint(option["size"]); got != fmt.Sprint(len(c.events)) {
		return c, fmt.Errorf("size %s of %d events", got, len(c.events))
	}
	return c, nil
}

func readEntries(data []byte) (events []event, err error) {
	r := bytes.NewReader(data)
	d := msgpack.NewDecoder(r)
	for r.Len() > 0 {
		var e event
		if n, err := d.DecodeArrayLen(); err != nil || n != 2 {
			return nil, fmt.Errorf("entry: an array of %d, %w", n, err)
		}
		id, size, err := d.DecodeExtHeader()
		if err != nil || id != 0 || size != 8 {
			return nil, fmt.Errorf("time: extension %d of %d bytes, %w", id, size, err)
		}
		var raw [8]byte
		if err := d.ReadFull(raw[:]); err != nil {
			return nil, err
		}
		e.Time = time.Unix(int64(binary.BigEndian.Uint32(raw[:4])), int64(binary.BigEndian.Uint32(raw[4:]))).UTC()
		if e.Fields, err = d.DecodeMap(); err != nil {
			return nil, fmt.Errorf("record: %w", err)
		}
		events = append(events, e)
	}
	return events, nil
}

func (s *forwardServer) set(answer func(int, received) any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answer = answer
}

func (s *forwardServer) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.chunks)
}

func (s *forwardServer) address() string { return s.ln.Addr().String() }

// lines returns the bodies by tag in the order that they came in.
func (s *forwardServer) lines() map[string][]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[string][]string{}
	for _, c := range s.chunks {
		for _, e := range c.events {
			out[c.tag] = append(out[c.tag], fmt.Sprint(e.Fields["message"]))
		}
	}
	return out
}

func newForwardOutput(t *testing.T, cfg Config) *Output {
	t.Helper()
	cfg.Mode = "forward"
	if cfg.ConnectTimeout == 0 {
		cfg.ConnectTimeout = 20 * time.Second // the machine may be busy
	}
	o, err := New(cfg, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := o.Close(); err != nil {
			t.Error(err)
		}
	})
	return o
}

func write(t *testing.T, o *Output, records []*record.Record) output.Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	return o.Write(ctx, records)
}

func clean(r output.Result) bool { return r.Err == nil && len(r.Retry)+len(r.Rejected) == 0 }

func secretFile(t *testing.T, secret string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(path, []byte(secret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// big returns records of about 20 KiB each.
func big(n int) []*record.Record {
	out := batch(n)
	for i, r := range out {
		r.Body = fmt.Sprint("line ", i, " ", strings.Repeat("x", 20<<10))
	}
	return out
}

// Whatever the compression: every event arrives once, with all its fields as
// record.Fields has them, each tag in order, over one connection.
func TestForward(t *testing.T) {
	for _, compression := range []string{"none", "gzip", "zstd"} {
		s := &forwardServer{}
		if compression != "none" {
			s.compressed = compression
		}
		startForward(t, s)
		o := newForwardOutput(t, Config{Address: s.address(), Compression: compression})
		records := batch(40)
		other := &record.Resource{Namespace: "bank", Service: "x", Pod: "p", PodUID: "u", Cluster: "c", Node: "n", Labels: map[string]string{"app.kubernetes.io/name": "y"}, WorkloadKind: "Deployment", Workload: "x", PodIP: "10.0.0.1", ContainerID: "abc", Image: "i"}
		for i, r := range records {
			if i%3 == 0 {
				r.Resource = other
			}
		}
		records[1].Attributes = map[string]any{
			"n": 1.5, "i": float64(-3), "large": 1e300, "ok": true, "no": false, "none": nil, "list": []any{"a", 2.25, map[string]any{"deep": nil}}, "map": map[string]any{"x": strings.Repeat("ü", 300)},
			"message": "lost to the body", "stream": "lost too", "kubernetes.namespace": "lost to the resource", "trace.id": "kept", "service.name": "said in the line",
		}
		records[2].Service, records[2].TraceID, records[2].SpanID, records[2].Level, records[2].TruncatedBytes = "said", "t", "s", "warn", 70000
		records[4].Time, records[4].Observed = time.Time{}, time.Unix(1, 2).UTC()
		records[5].Origin = record.Origin{}
		records[6].Body = strings.Repeat("z", 70000)
		for range 2 {
			if got := write(t, o, records); !clean(got) {
				t.Fatalf("%s: %+v", compression, got)
			}
		}
		want := map[string][]event{}
		for _, r := range slices.Concat(records, records) {
			at := r.Time
			if at.IsZero() {
				at = r.Observed
			}
			tag := "kube." + r.Resource.Namespace + "." + strings.ReplaceAll(r.Resource.Service, ".", "_")
			want[tag] = append(want[tag], event{Time: at, Fields: jsonOf(t, r.Fields())})
		}
		got := map[string][]event{}
		s.stop()
		for _, c := range s.chunks {
			for _, e := range c.events {
				e.Fields = jsonOf(t, e.Fields)
				got[c.tag] = append(got[c.tag], e)
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: %s", compression, diff)
		}
		if s.opened != 1 {
			t.Errorf("%s: %d connections; want 1", compression, s.opened)
		}
	}
}

// jsonOf makes numbers of different types comparable.
func jsonOf(t *testing.T, fields map[string]any) map[string]any {
	t.Helper()
	data, err := json.Marshal(fields)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]any{}
	if err := json.Unmarshal(data, &out); err != nil {
		t.Fatal(err)
	}
	return out
}

// The next chunks are sent while acknowledgements are due, but no more than the
// window; and acknowledgements may come in any order.
func TestForwardWindow(t *testing.T) {
	var open []string
	most := 0
	s := startForward(t, &forwardServer{answer: func(n int, c received) any {
		open = append(open, c.id)
		most = max(most, len(open))
		if len(open) < 4 && n != 9 { // hold back until the window must be full
			return nil
		}
		slices.Reverse(open)
		ids := several(open)
		open = nil
		return ids
	}})
	o := newForwardOutput(t, Config{Address: s.address(), Window: 4, MaxChunkBytes: 64 << 10})
	// Three records a chunk.
	if got := write(t, o, big(30)); !clean(got) {
		t.Fatalf("%+v", got)
	}
	s.stop()
	if len(s.chunks) != 10 || most != 4 {
		t.Errorf("%d chunks, at most %d on their way; want 10 and 4", len(s.chunks), most)
	}
	for _, c := range s.chunks {
		if c.bytes > 64<<10 {
			t.Errorf("a chunk of %d bytes", c.bytes)
		}
	}
}

// A server that takes its time for every chunk is not late: a chunk's time begins
// when the one before it was acknowledged.
func TestForwardSlowServer(t *testing.T) {
	s := startForward(t, &forwardServer{answer: func(n int, c received) any {
		time.Sleep(300 * time.Millisecond)
		return takes(n, c)
	}})
	o := newForwardOutput(t, Config{Address: s.address(), AckTimeout: time.Second, MaxChunkBytes: 64 << 10})
	if got := write(t, o, big(18)); !clean(got) { // six chunks
		t.Errorf("%+v", got)
	}
}

// What is acknowledged is, whatever becomes of the rest; and the output recovers.
func TestForwardFailures(t *testing.T) {
	const each = 3 // records in a chunk
	f := func(name string, answer func(int, received) any, wantErr string, wantRetry ...int) {
		t.Helper()
		s := startForward(t, &forwardServer{answer: answer})
		o := newForwardOutput(t, Config{Address: s.address(), AckTimeout: 300 * time.Millisecond, MaxChunkBytes: 64 << 10})
		got := write(t, o, big(4*each))
		if (got.Err != nil) != (wantErr != "") || got.Permanent || !cmp.Equal(got.Retry, wantRetry) || len(got.Rejected) > 0 {
			t.Errorf("%s: %+v; want error %q, retry %v", name, got, wantErr, wantRetry)
		}
		if got.Err != nil && !strings.Contains(got.Err.Error(), wantErr) {
			t.Errorf("%s: %v; want %q", name, got.Err, wantErr)
		}
		s.set(takes)
		if got := write(t, o, batch(2)); !clean(got) {
			t.Errorf("%s, after the server has recovered: %+v", name, got)
		}
	}
	but := func(missing int, answer any) func(int, received) any {
		return func(n int, c received) any {
			if n == missing {
				return answer
			}
			return takes(n, c)
		}
	}
	f("never acknowledges", func(int, received) any { return nil }, "no acknowledgement")
	f("forgets the second", but(1, nil), "", 3, 4, 5)
	f("closes at once", but(0, closeConn{}), "a chunk")
	f("closes after the third", but(3, closeConn{}), "", 9, 10, 11)
	f("acknowledges another chunk", but(3, several{"another"}), "", 9, 10, 11)
	f("answers a text", func(int, received) any { return "hello" }, "neither an acknowledgement nor a handshake")
	f("answers by PONG", func(int, received) any { return []any{"PONG", true, "", "", ""} }, "something else than an acknowledgement")
}

// A server drops what is over its limit without a word. Chunks become smaller until
// it takes them; a single event that is over it is rejected.
func TestForwardServerLimit(t *testing.T) {
	const limit = 100 << 10
	s := startForward(t, &forwardServer{answer: func(n int, c received) any {
		if c.bytes > limit {
			return nil
		}
		return takes(n, c)
	}})
	o := newForwardOutput(t, Config{Address: s.address(), AckTimeout: 300 * time.Millisecond})
	records := big(12) // 240 KiB
	records[11].Body = strings.Repeat("y", limit)
	left := make([]int, len(records))
	for i := range left {
		left[i] = i
	}
	rejected := -1
	for attempt := 0; len(left) > 0; attempt++ {
		if attempt == 10 {
			t.Fatalf("still %d to be sent after 10 attempts", len(left))
		}
		var again []*record.Record
		for _, i := range left {
			again = append(again, records[i])
		}
		got := write(t, o, again)
		if got.Err != nil {
			continue
		}
		for _, x := range got.Rejected {
			rejected = left[x.Index]
			if !strings.Contains(x.Reason, "chunk_size_limit") {
				t.Errorf("reason %q", x.Reason)
			}
		}
		var next []int
		for _, i := range got.Retry {
			next = append(next, left[i])
		}
		left = next
	}
	if rejected != 11 {
		t.Errorf("rejected %d; want the last, which the server never takes", rejected)
	}
}

// The probe after a large event does not disturb the next batch, nor one that a
// server never acknowledges.
func TestForwardProbe(t *testing.T) {
	for _, answersProbes := range []bool{true, false} {
		s := startForward(t, &forwardServer{answer: func(n int, c received) any {
			if len(c.events) == 0 && !answersProbes {
				return nil
			}
			return takes(n, c)
		}})
		o := newForwardOutput(t, Config{Address: s.address()})
		records := batch(1)
		records[0].Body = strings.Repeat("x", minChunkBytes)
		for range 3 {
			if got := write(t, o, records); !clean(got) {
				t.Errorf("probes answered %t: %+v", answersProbes, got)
			}
		}
		// Nobody waits for the last probe, so it may still be on its way.
		count := func() int {
			s.mu.Lock()
			defer s.mu.Unlock()
			return len(s.chunks)
		}
		for deadline := time.Now().Add(10 * time.Second); count() < 6 && time.Now().Before(deadline); {
			time.Sleep(time.Millisecond)
		}
		s.stop()
		if s.opened != 1 || len(s.chunks) != 6 {
			t.Errorf("%d connections, %d chunks; want 1 and 6", s.opened, len(s.chunks))
		}
	}
}

func TestForwardRejects(t *testing.T) {
	s := startForward(t, &forwardServer{})
	o := newForwardOutput(t, Config{Address: s.address(), MaxChunkBytes: 64 << 10})
	records := batch(5)
	records[0].Attributes = map[string]any{"x": make(chan int)}
	records[2].Body = strings.Repeat("x", 64<<10)
	deep := any("x")
	for range 200 {
		deep = []any{deep}
	}
	records[3].Attributes = map[string]any{"deep": deep}
	got := write(t, o, records)
	if got.Err != nil || len(got.Retry) > 0 || len(got.Rejected) != 3 {
		t.Fatalf("%+v", got)
	}
	for i, want := range []struct {
		index  int
		reason string
	}{{0, `attribute "x"`}, {2, "maxChunkBytes"}, {3, "nested"}} {
		if x := got.Rejected[i]; x.Index != want.index || !strings.Contains(x.Reason, want.reason) || len(x.Reason) > 1000 {
			t.Errorf("%+v; want %+v", x, want)
		}
	}
	if diff := cmp.Diff(map[string][]string{"kube.shop.payments_v2": {"line 1", "line 4"}}, s.lines()); diff != "" {
		t.Error(diff)
	}
	// A batch of nothing else needs no server.
	s.stop()
	if got := write(t, o, records[:1]); got.Err != nil || len(got.Rejected) != 1 {
		t.Errorf("%+v", got)
	}
}

func TestForwardHandshake(t *testing.T) {
	f := func(name string, s *forwardServer, cfg Config, wantErr string) {
		t.Helper()
		startForward(t, s)
		cfg.Address = s.address()
		got := write(t, newForwardOutput(t, cfg), batch(3))
		if wantErr == "" {
			if !clean(got) {
				t.Errorf("%s: %+v", name, got)
			}
			return
		}
		if got.Err == nil || !got.Permanent || !strings.Contains(got.Err.Error(), wantErr) || strings.Contains(got.Err.Error(), "s3cret") {
			t.Errorf("%s: %+v; want a permanent error with %q", name, got, wantErr)
		}
	}
	key, wrong, none := secretFile(t, "s3cret"), secretFile(t, "s3cret2"), filepath.Join(t.TempDir(), "none")
	users := map[string]string{"node": "pw"}
	f("shared key", &forwardServer{key: "s3cret"}, Config{SharedKeyFile: key}, "")
	f("and user", &forwardServer{key: "s3cret", users: users}, Config{SharedKeyFile: key, Username: "node", PasswordFile: secretFile(t, "pw")}, "")
	f("user that nobody asked for", &forwardServer{key: "s3cret"}, Config{SharedKeyFile: key, Username: "node", PasswordFile: secretFile(t, "pw")}, "")
	f("wrong key", &forwardServer{key: "s3cret"}, Config{SharedKeyFile: wrong}, "sharedKeyFile")
	f("wrong password", &forwardServer{key: "s3cret", users: users}, Config{SharedKeyFile: key, Username: "node", PasswordFile: wrong}, "passwordFile")
	f("no user", &forwardServer{key: "s3cret", users: users, lenient: true}, Config{SharedKeyFile: key}, "set username")
	f("no key", &forwardServer{key: "s3cret", lenient: true}, Config{}, "set sharedKeyFile")
	f("no file", &forwardServer{key: "s3cret", lenient: true}, Config{SharedKeyFile: none}, "sharedKeyFile")
	f("server without the key", &forwardServer{key: "s3cret", liar: true}, Config{SharedKeyFile: key}, "does not know the shared key")

	s := startForward(t, &forwardServer{})
	got := write(t, newForwardOutput(t, Config{Address: s.address(), SharedKeyFile: key, WriteTimeout: 200 * time.Millisecond}), batch(1))
	if got.Err == nil || !strings.Contains(got.Err.Error(), "leave sharedKeyFile out") {
		t.Errorf("a server that does not greet: %+v", got)
	}
}

// A key that was changed on both sides needs no reload.
func TestForwardKeyIsReadAgain(t *testing.T) {
	key := secretFile(t, "old")
	s := startForward(t, &forwardServer{key: "new"})
	o := newForwardOutput(t, Config{Address: s.address(), SharedKeyFile: key})
	if got := write(t, o, batch(1)); !got.Permanent {
		t.Fatalf("%+v", got)
	}
	if err := os.WriteFile(key, []byte("new"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := write(t, o, batch(1)); !clean(got) {
		t.Errorf("%+v", got)
	}
}

// Servers that close after every chunk: one says so in its greeting, of the other
// the configuration says it.
func TestForwardNoKeepalive(t *testing.T) {
	no := false
	f := func(s *forwardServer, cfg Config) {
		t.Helper()
		startForward(t, s)
		cfg.Address, cfg.MaxChunkBytes = s.address(), 64<<10
		if got := write(t, newForwardOutput(t, cfg), big(9)); !clean(got) {
			t.Errorf("%+v", got)
		}
		s.stop()
		if s.opened != 3 || len(s.chunks) != 3 {
			t.Errorf("%d connections, %d chunks; want 3", s.opened, len(s.chunks))
		}
	}
	f(&forwardServer{key: "k", noKeep: true, announce: true}, Config{SharedKeyFile: secretFile(t, "k")})
	f(&forwardServer{noKeep: true}, Config{Keepalive: &no})
}

// A connection that the server closed while it was idle is not used again.
func TestForwardServerRestarts(t *testing.T) {
	ln := listen(t)
	s := startForward(t, &forwardServer{ln: ln})
	o := newForwardOutput(t, Config{Address: s.address()})
	if got := write(t, o, batch(1)); !clean(got) {
		t.Fatalf("%+v", got)
	}
	address := s.address()
	s.stop()
	if got := write(t, o, batch(1)); got.Err == nil {
		t.Fatalf("%+v", got)
	}
	ln, err := net.Listen("tcp", address)
	if err != nil {
		t.Skip("SKIPPED: another took the port: ", err)
	}
	startForward(t, &forwardServer{ln: ln})
	if got := write(t, o, batch(1)); !clean(got) {
		t.Errorf("%+v", got)
	}
}

func TestForwardSeveralServers(t *testing.T) {
	gone := listen(t)
	if err := gone.Close(); err != nil {
		t.Fatal(err)
	}
	a, b := startForward(t, &forwardServer{}), startForward(t, &forwardServer{})
	o := newForwardOutput(t, Config{Servers: []Server{{Address: gone.Addr().String()}, {Address: a.address()}, {Address: b.address()}}})
	for range 3 {
		if got := write(t, o, batch(1)); !clean(got) {
			t.Fatalf("%+v", got)
		}
	}
	if a.count() != 3 || b.count() != 0 {
		t.Errorf("first: %d and %d chunks; want 3 and 0", a.count(), b.count())
	}
	a.stop()
	if got := write(t, o, batch(1)); !clean(got) { // it has not seen yet that the server is gone
		if got = write(t, o, batch(1)); !clean(got) {
			t.Errorf("%+v", got)
		}
	}
	if b.count() != 1 {
		t.Errorf("%d chunks; want the next server to take over", b.count())
	}
	b.stop()
	_ = write(t, o, batch(1)) // as above
	if got := write(t, o, batch(1)); got.Err == nil || got.Permanent || !strings.Contains(got.Err.Error(), b.address()) || !strings.Contains(got.Err.Error(), a.address()) {
		t.Errorf("%+v; want an error that names all", got)
	}

	a, b = startForward(t, &forwardServer{}), startForward(t, &forwardServer{})
	o = newForwardOutput(t, Config{Servers: []Server{{Address: a.address(), Weight: 1}, {Address: b.address(), Weight: 3}}, Balance: "weighted"})
	for range 8 {
		if got := write(t, o, batch(1)); !clean(got) {
			t.Fatalf("%+v", got)
		}
	}
	if a.count() != 2 || b.count() != 6 {
		t.Errorf("weighted: %d and %d chunks; want 2 and 6", a.count(), b.count())
	}
}

func TestForwardContextEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	s := startForward(t, &forwardServer{answer: func(n int, c received) any {
		if n == 2 {
			cancel()
			return nil
		}
		return takes(n, c)
	}})
	o := newForwardOutput(t, Config{Address: s.address(), MaxChunkBytes: 64 << 10, Window: 1})
	if got := o.Write(ctx, big(12)); got.Err != nil || !cmp.Equal(got.Retry, []int{6, 7, 8, 9, 10, 11}) {
		t.Errorf("%+v; want two chunks acknowledged and the rest to be sent again", got)
	}
	if got := o.Write(ctx, batch(1)); !errors.Is(got.Err, context.Canceled) {
		t.Errorf("%+v", got)
	}
	if got := write(t, o, batch(1)); !clean(got) {
		t.Errorf("%+v", got)
	}
}

func TestForwardTLSAndUnix(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	startForward(t, &forwardServer{ln: ln})
	if got := write(t, newForwardOutput(t, Config{Address: "unix://" + path}), batch(2)); !clean(got) {
		t.Errorf("unix: %+v", got)
	}

	// A certificate for example.com and 127.0.0.1, signed by itself.
	certificate := httptest.NewUnstartedServer(nil)
	certificate.StartTLS()
	defer certificate.Close()
	certFile, keyFile := writePair(t, certificate.TLS.Certificates[0])
	tlsServer := func(auth tls.ClientAuthType) *forwardServer {
		return startForward(t, &forwardServer{lenient: true, ln: tls.NewListener(listen(t), &tls.Config{Certificates: certificate.TLS.Certificates, MinVersion: tls.VersionTLS12, ClientAuth: auth})})
	}
	s := tlsServer(tls.NoClientCert)
	f := func(name string, cfg Config, wantErr string) {
		t.Helper()
		if cfg.Address == "" {
			cfg.Address = s.address()
		}
		cfg.TLS = true
		o := newForwardOutput(t, cfg)
		got := write(t, o, batch(2))
		// What the server says can be lost when it hangs up at once.
		for began := time.Now(); wantErr != "" && got.Err != nil && !got.Permanent && time.Since(began) < 30*time.Second; {
			got = write(t, o, batch(2))
		}
		if wantErr == "" && !clean(got) || wantErr != "" && (got.Err == nil || !got.Permanent || !strings.Contains(got.Err.Error(), wantErr)) {
			t.Errorf("%s: %+v; want %q", name, got, wantErr)
		}
	}
	f("skip verify", Config{InsecureSkipVerify: true}, "")
	f("authority", Config{CAFile: certFile}, "")
	f("server name", Config{CAFile: certFile, ServerName: "example.com"}, "")
	f("unknown authority", Config{}, "set caFile")
	f("another host", Config{CAFile: certFile, ServerName: "elsewhere.example"}, "set serverName")
	f("no such file", Config{CAFile: certFile + "x"}, "caFile")
	f("not TLS", Config{Address: startForward(t, &forwardServer{key: "greets at once", lenient: true}).address()}, "does not speak TLS")
	var refused permanentError
	if _, err := readAnswer(bufio.NewReader(strings.NewReader("\x15\x03\x03\x00\x02\x02\x46"))); !errors.As(err, &refused) || !strings.Contains(err.Error(), "set tls") {
		t.Errorf("no TLS to a server with it: %v", err)
	}
	s = tlsServer(tls.RequireAnyClientCert)
	f("client certificate", Config{CAFile: certFile, CertFile: certFile, KeyFile: keyFile}, "")
	f("no client certificate", Config{CAFile: certFile}, "set certFile and keyFile")
	f("missing client certificate", Config{CAFile: certFile, CertFile: certFile + "x", KeyFile: keyFile}, "certFile")
}

func TestEncoderForgetsResources(t *testing.T) {
	e := newEncoder()
	for range maxFragments + 10 {
		r := batch(1)[0]
		if _, err := e.entry(nil, r); err != nil {
			t.Fatal(err)
		}
	}
	if len(e.fragments) > maxFragments {
		t.Errorf("%d fragments", len(e.fragments))
	}
}

// plain returns records of 200 bytes without attributes, as most lines are.
func plain(n int) []*record.Record {
	res := &record.Resource{Cluster: "prod", Node: "node-17", Namespace: "shop", Pod: "payments-7d9c8b5f6d-x2vzq", PodUID: "0e8f3c1a-5a5e-4d39-9f2c-2f6f7f1d4b11", Container: "app", Service: "payments", Labels: map[string]string{"app.kubernetes.io/name": "payments", "pod-template-hash": "7d9c8b5f6d"}}
	out := batch(n)
	for i, r := range out {
		r.Resource = res
		r.Body = strings.Repeat("x", 200)
		r.Time = r.Time.Add(time.Duration(i) * time.Millisecond)
		r.Origin.Path = "/var/log/pods/shop_payments-7d9c8b5f6d-x2vzq_0e8f3c1a-5a5e-4d39-9f2c-2f6f7f1d4b11/app/0.log"
	}
	return out
}

func TestEncodingAllocatesNothing(t *testing.T) {
	e := newEncoder()
	records := plain(100)
	structured := plain(1)[0]
	structured.Attributes = map[string]any{"http.response.status_code": 402.0, "url.path": "/pay", "list": []any{"a"}, "ok": true}
	records = append(records, structured)
	b := make([]byte, 0, 1<<20)
	encode := func() {
		b = b[:0]
		for _, r := range records {
			var err error
			if b, err = e.entry(b, r); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got := testing.AllocsPerRun(100, encode); got != 0 {
		t.Errorf("%v allocations in 101 records; want none", got)
	}
}

func BenchmarkEncode(b *testing.B) {
	e := newEncoder()
	records := plain(1000)
	var buf []byte
	b.SetBytes(200 * 1000)
	b.ReportAllocs()
	for b.Loop() {
		buf = buf[:0]
		for _, r := range records {
			var err error
			if buf, err = e.entry(buf, r); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.ReportMetric(float64(len(buf))/1000, "wirebytes/record")
}

// BenchmarkForward is the whole way to a server on loopback that reads and
// acknowledges.
func BenchmarkForward(b *testing.B) {
	for _, compression := range []string{"none", "gzip", "zstd"} {
		b.Run(compression, func(b *testing.B) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			var wg sync.WaitGroup
			wg.Go(func() { acknowledgeAll(ln) })
			o, err := New(Config{Address: ln.Addr().String(), Compression: compression, MaxChunkBytes: 1 << 20}, slog.New(slog.DiscardHandler))
			if err != nil {
				b.Fatal(err)
			}
			records := plain(5000)
			b.SetBytes(200 * int64(len(records)))
			b.ReportAllocs()
			for b.Loop() {
				if got := o.Write(b.Context(), records); !clean(got) {
					b.Fatalf("%+v", got)
				}
			}
			_ = o.Close()
			_ = ln.Close()
			wg.Wait()
		})
	}
}

// BenchmarkGzip compresses a chunk as we do, and as the fastest level of others
// does, which does not know what the entries have in common.
func BenchmarkGzip(b *testing.B) {
	tag, err := parseTag("kube")
	if err != nil {
		b.Fatal(err)
	}
	f := newForward(Config{Compression: "gzip", MaxChunkBytes: 1 << 20}, slog.New(slog.DiscardHandler), tag)
	records := plain(1000)
	for i, r := range records {
		r.Body = fmt.Sprintf("INFO  [worker-%d] com.example.shop.OrderService - order %d of customer %d accepted and handed to the carrier after %d ms", i%16, 10_000_000+i*7919%80_000_000, 100_000+i*104_729%900_000, 10+i*31%90)
	}
	f.begin(records)
	f.next(records)
	b.Run("ours", func(b *testing.B) {
		b.SetBytes(int64(len(f.packed)))
		b.ReportAllocs()
		size := 0
		for b.Loop() {
			size = len(f.compressGzip())
		}
		b.ReportMetric(100*float64(size)/float64(len(f.packed)), "%")
	})
	b.Run("klauspost", func(b *testing.B) {
		var out bytes.Buffer
		w, err := kgzip.NewWriterLevel(&out, kgzip.BestSpeed)
		if err != nil {
			b.Fatal(err)
		}
		b.SetBytes(int64(len(f.packed)))
		b.ReportAllocs()
		for b.Loop() {
			out.Reset()
			w.Reset(&out)
			_, _ = w.Write(f.packed) // into memory
			_ = w.Close()
		}
		b.ReportMetric(100*float64(out.Len())/float64(len(f.packed)), "%")
	})
}

func acknowledgeAll(ln net.Listener) {
	conn, err := ln.Accept()
	if err != nil {
		return
	}
	defer func() { _ = conn.Close() }()
	r := bufio.NewReaderSize(conn, 256<<10)
	for {
		var head [2]byte
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return
		}
		_, _ = r.Discard(int(head[1] & 0x1f))
		var size [5]byte
		if _, err := io.ReadFull(r, size[:]); err != nil {
			return
		}
		n := int(binary.BigEndian.Uint32(size[1:]))
		if size[0] == 0xc5 {
			n = int(binary.BigEndian.Uint16(size[1:]))
			n -= 2
		}
		_, _ = r.Discard(n)
		option, err := msgpack.NewDecoder(r).DecodeMap()
		if err != nil {
			return
		}
		if err := msgpack.NewEncoder(conn).Encode(map[string]any{"ack": option["chunk"]}); err != nil {
			return
		}
	}
}

// FuzzReadAnswer: any answer is one of ours or an error, and costs no more memory
// than its limit.
func FuzzReadAnswer(f *testing.F) {
	for _, v := range []any{
		map[string]any{"ack": "id"},
		[]any{"HELO", map[string]any{"nonce": []byte{1, 2}, "auth": "x", "keepalive": false}},
		[]any{"PONG", false, "reason", "host", strings.Repeat("d", 128)},
		[]any{"HELO", nil},
		[]any{1, 1.5, -1, uint64(1 << 60), nil, []any{}},
		"text",
	} {
		data, err := msgpack.Marshal(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte{0xdd, 0xff, 0xff, 0xff, 0xff})
	f.Add([]byte{0xc6, 0xff, 0xff, 0xff, 0xff})
	f.Add(bytes.Repeat([]byte{0x91}, 100))
	f.Fuzz(func(t *testing.T, data []byte) {
		v, err := readAnswer(bufio.NewReader(bytes.NewReader(data)))
		if (v == nil) == (err == nil) {
			t.Fatalf("%v, %v", v, err)
		}
		if a, ok := v.(acknowledgement); ok && a.chunk == "" {
			t.Fatal("an acknowledgement of nothing")
		}
	})
}

// FuzzEncode: what is encoded can be decoded, and says the same.
func FuzzEncode(f *testing.F) {
	f.Add("line", "name", "value", 1.5, int64(7))
	f.Add("\xff\x00", "message", "", 0.0, int64(-1))
	f.Fuzz(func(t *testing.T, body, name, value string, number float64, nanos int64) {
		r := &record.Record{Time: time.Unix(0, nanos).UTC(), Body: body, Resource: &record.Resource{Pod: value}, Attributes: map[string]any{name: value, name + "n": number}}
		data, err := newEncoder().entry(nil, r)
		if err != nil {
			t.Fatal(err)
		}
		events, err := readEntries(data)
		if err != nil || len(events) != 1 {
			t.Fatalf("%v, %v", events, err)
		}
		want := r.Fields()
		if len(want) != len(events[0].Fields) {
			t.Fatalf("got %v\nwant %v", events[0].Fields, want)
		}
		for k, v := range want {
			got := events[0].Fields[k]
			if s, ok := v.(string); ok && got != s {
				t.Fatalf("%q: got %q; want %q", k, got, s)
			}
		}
	})
}

func writePair(t *testing.T, c tls.Certificate) (certFile, keyFile string) {
	t.Helper()
	key, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	if err := os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]}), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}), 0o600); err != nil {
		t.Fatal(err)
	}
	return certFile, keyFile
}
