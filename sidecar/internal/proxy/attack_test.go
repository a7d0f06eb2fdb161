package proxy_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"path"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/balance"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/http2"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/mtls/mtlstest"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/route"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
)

// TestAttack is the table of what strangers do to a proxy. A row shows that the
// attack is refused or bounded, that others are served meanwhile, that the access
// log says why, and that outrigger_protocol_errors_total counts it, as far as
// each applies.
func TestAttack(t *testing.T) {
	for _, row := range []struct {
		name string
		run  func(t *testing.T)
	}{
		{"rapid reset (CVE-2023-44487)", rapidReset},
		{"rapid reset that we are made to send (CVE-2025-8671)", madeYouReset},
		{"CONTINUATION flood (CVE-2024-27316)", continuationFlood},
		{"HPACK bomb", hpackBomb},
		{"cookie flood", cookieFlood},
		{"settings flood (CVE-2019-9515)", settingsFlood},
		{"ping flood (CVE-2019-9512)", pingFlood},
		{"empty DATA flood (CVE-2019-9518)", emptyDataFlood},
		{"slow read, HTTP 1", func(t *testing.T) { slowRead(t, 1) }},
		{"slow read, HTTP 2", func(t *testing.T) { slowRead(t, 2) }},
		{"slow upstream bounds a large upload", slowUpstream},
		{"slowloris in the head", slowHead},
		{"slowloris in the body", slowBody},
		{"CL and TE", smuggle(
			"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
			"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
			"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
			"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: CHUNKED\r\n\r\n0\r\n\r\n",
			"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\ntransfer-encoding:\tchunked\r\n\r\n0\r\n\r\n")},
		{"TE that is not plainly chunked", smuggle(
			te("xchunked"), te("chunked, identity"), te("identity, chunked"), te("gzip, chunked"), te("chunked, chunked"), te("\"chunked\""), te("chunked;a=b"),
			te("chun\x0bked"), te("\x0bchunked"), te("chunked\x00"), te(""), te("chunked\r\nTransfer-Encoding: identity"), te("identity\r\nTransfer-Encoding: chunked"),
			te("chunked\r\n , identity"),
			"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
			"POST / HTTP/1.1\r\nHost: x\r\nTransfer\x00Encoding: chunked\r\n\r\n0\r\n\r\n",
			"POST / HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")},
		{"differing CLs", smuggle(cl("5\r\nContent-Length: 6"), cl("5, 6"), cl("5\r\nContent-Length: 5"), cl("5, 5"), cl("+5"), cl("-5"), cl("0x5"), cl("5 5"), cl("5_0"), cl(""), cl("99999999999999999999"), cl("5\r\n 6"))},
		{"obs-fold", smuggle("GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n", "GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n\tc\r\n\r\n", "GET / HTTP/1.1\r\n Host: x\r\n\r\n")},
		{"bare LF and bare CR", smuggle("GET / HTTP/1.1\nHost: x\n\n", "GET / HTTP/1.1\r\nHost: x\nA: b\r\n\r\n", "GET / HTTP/1.1\r\nHost: x\r\n\n", "GET / HTTP/1.1\r\nHost: x\r\nA: b\rC: d\r\n\r\n",
			"GET / HTTP/1.1\r\r\nHost: x\r\n\r\n", chunked("5\nhello\r\n0\r\n\r\n"), chunked("5\r\nhello\n0\r\n\r\n"), chunked("0\n\r\n"), chunked("0\r\n\n"))},
		{"space before the colon (CVE-2019-16276)", smuggle("GET / HTTP/1.1\r\nHost : x\r\n\r\n", "GET / HTTP/1.1\r\nHost: x\r\nA : b\r\n\r\n", "GET / HTTP/1.1\r\nHost: x\r\nA\t: b\r\n\r\n", "GET / HTTP/1.1\r\nHost: x\r\nA b: c\r\n\r\n")},
		{"chunk sizes and extensions (CVE-2023-39326)", smuggle(chunked("-1\r\n\r\n"), chunked("0x5\r\nhello\r\n0\r\n\r\n"), chunked(" 5\r\nhello\r\n0\r\n\r\n"), chunked("5 \r\nhello\r\n0\r\n\r\n"),
			chunked("fffffffffffffffff\r\n"), chunked("5;a\nb\r\nhello\r\n0\r\n\r\n"), chunked("5;"+strings.Repeat("x", 70<<10)+"\r\nhello\r\n0\r\n\r\n"),
			chunked("5\r\nhello6\r\n0\r\n\r\n"), chunked("0\r\nContent-Length: 5\r\n\r\n"), chunked("0\r\nX-Forwarded-For: a\r\n\r\n"))},
		{"downgrade from HTTP 2 to HTTP 1", downgrade},
		{"lengths that lie, from HTTP 2 to HTTP 1", lyingLengths},
		{"Connection names our headers (golang.org/issue/46313)", hopByHop},
		{"query that cannot be parsed (CVE-2022-2880)", oddQueries},
		{"path that is read differently (CVE-2021-31920 and others)", oddPaths},
		{"path with what cannot be agreed on", smuggle("GET /a%2fb HTTP/1.1\r\nHost: x\r\n\r\n", "GET /a%2Fb HTTP/1.1\r\nHost: x\r\n\r\n", "GET /a%5cb HTTP/1.1\r\nHost: x\r\n\r\n", "GET /a%00 HTTP/1.1\r\nHost: x\r\n\r\n",
			"GET /a\\b HTTP/1.1\r\nHost: x\r\n\r\n", "GET /a#b HTTP/1.1\r\nHost: x\r\n\r\n", "GET /../a HTTP/1.1\r\nHost: x\r\n\r\n", "GET /a/..;b=c/d HTTP/1.1\r\nHost: x\r\n\r\n", "GET /a/.;/d HTTP/1.1\r\nHost: x\r\n\r\n",
			"GET /a%zz HTTP/1.1\r\nHost: x\r\n\r\n", "GET a HTTP/1.1\r\nHost: x\r\n\r\n", "GET /a b HTTP/1.1\r\nHost: x\r\n\r\n")},
		{"host and authority that differ, HTTP 1", smuggle("GET http://a/ HTTP/1.1\r\nHost: b\r\n\r\n", "GET http://a:81/ HTTP/1.1\r\nHost: a\r\n\r\n", "GET http://a@b/ HTTP/1.1\r\nHost: b\r\n\r\n",
			"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", "GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", "GET / HTTP/1.1\r\n\r\n")},
		{"host and authority that differ, HTTP 2", func(t *testing.T) {
			refusedStreams(t, http2.ReasonHost, fields{{":method", "GET"}, {":scheme", "http"}, {":authority", "a"}, {":path", "/"}, {"host", "b"}},
				fields{{":method", "GET"}, {":scheme", "http"}, {":authority", "a b"}, {":path", "/"}},
				fields{{":method", "GET"}, {":scheme", "http"}, {":authority", "a@b"}, {":path", "/"}},
				fields{{":method", "GET"}, {":scheme", "http"}, {":authority", "a"}, {":path", "/"}, {"host", "a"}, {"host", "a"}})
		}},
		{"method in another case, over HTTP 2 (GHSA-w44g-8m76-8gc5)", methodCase},
		{"too many and too large headers, HTTP 1", smuggle("GET / HTTP/1.1\r\nHost: x\r\n"+strings.Repeat("A: b\r\n", 200)+"\r\n", "GET / HTTP/1.1\r\nHost: x\r\nA: "+strings.Repeat("b", 70<<10)+"\r\n\r\n",
			"GET /"+strings.Repeat("a", 70<<10)+" HTTP/1.1\r\nHost: x\r\n\r\n")},
		{"headers that come twice are matched as one value", duplicates},
		{"names with underscores", underscores},
		{"claims of a stranger", claims},
		{"CONNECT and unasked upgrades", connect},
		{"no configuration, and a broken one, let nothing through", failClosed},
		{"plaintext where mutual TLS is required", plaintext},
	} {
		t.Run(row.name, row.run)
	}
}

func te(value string) string {
	return "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: " + value + "\r\n\r\n0\r\n\r\n"
}

func cl(value string) string {
	return "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: " + value + "\r\n\r\nhello"
}

func chunked(body string) string {
	return "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + body
}

// servesOthers fails the test where a client that has done nothing is not served
// in time.
func (m *mesh) servesOthers() {
	m.t.Helper()
	tr := &http.Transport{DisableKeepAlives: true}
	c := http.Client{Timeout: 3 * time.Second, Transport: tr}
	resp, err := c.Get("http://" + m.addr + "/others")
	if err != nil {
		m.t.Errorf("another client is not served: %v", err)
		return
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		m.t.Errorf("another client is answered %s", resp.Status)
	}
}

// tells waits for a line of the access log whose reason begins so, and for its
// counter.
func (m *mesh) tells(t *testing.T, reason string) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for {
		m.mu.Lock()
		logged := slices.ContainsFunc(m.lines, func(l map[string]any) bool {
			why, _ := l["error.message"].(string)
			return strings.HasPrefix(why, reason)
		})
		m.mu.Unlock()
		n := counted(t, m.registry, "outrigger_protocol_errors_total", "downstream", reason)
		if logged && n > 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("%s: in the access log: %v; counted: %v", reason, logged, n)
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// fields of a section, in order.
type fields [][2]string

func get2(path string, more ...[2]string) fields {
	return append(fields{{":method", "GET"}, {":scheme", "http"}, {":authority", "payments.shop"}, {":path", path}}, more...)
}

// rawH2 is an HTTP/2 client without manners.
type rawH2 struct {
	t    *testing.T
	c    *net.TCPConn
	fr   *xhttp2.Framer
	enc  *hpack.Encoder
	buf  bytes.Buffer
	over chan struct{} // closed when the sidecar has ended the connection

	mu     sync.Mutex
	goAway *xhttp2.ErrCode
	resets map[uint32]xhttp2.ErrCode
	heads  map[uint32]string // :status by stream
}

// attackH2 connects; it reads all that comes unless deaf.
func (m *mesh) attackH2(t *testing.T, deaf bool, settings ...xhttp2.Setting) *rawH2 {
	t.Helper()
	r := &rawH2{t: t, c: m.dial(), over: make(chan struct{}), resets: map[uint32]xhttp2.ErrCode{}, heads: map[uint32]string{}}
	_ = r.c.SetDeadline(time.Now().Add(30 * time.Second))
	r.enc = hpack.NewEncoder(&r.buf)
	r.fr = xhttp2.NewFramer(r.c, r.c)
	if _, err := io.WriteString(r.c, xhttp2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	if err := r.fr.WriteSettings(settings...); err != nil {
		t.Fatal(err)
	}
	if deaf {
		return r
	}
	r.fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	go func() {
		defer close(r.over)
		for {
			f, err := r.fr.ReadFrame()
			if err != nil {
				return
			}
			r.mu.Lock()
			switch f := f.(type) {
			case *xhttp2.GoAwayFrame:
				r.goAway = &f.ErrCode
			case *xhttp2.RSTStreamFrame:
				r.resets[f.StreamID] = f.ErrCode
			case *xhttp2.MetaHeadersFrame:
				r.heads[f.StreamID] += f.PseudoValue("status")
			}
			r.mu.Unlock()
		}
	}()
	t.Cleanup(func() { _ = r.c.Close(); <-r.over })
	return r
}

func (r *rawH2) block(fs fields) []byte {
	r.buf.Reset()
	for _, f := range fs {
		_ = r.enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}) // to memory
	}
	return r.buf.Bytes()
}

func (r *rawH2) headers(id uint32, end bool, fs fields) error {
	return r.fr.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: id, BlockFragment: r.block(fs), EndHeaders: true, EndStream: end})
}

// ended waits until the sidecar has had enough, and says so with this code.
func (r *rawH2) ended(code xhttp2.ErrCode) {
	r.t.Helper()
	select {
	case <-r.over:
	case <-time.After(10 * time.Second):
		r.t.Error("the connection goes on")
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.goAway == nil {
		r.t.Log("the connection ended before its GOAWAY was read") // a reset may overtake it
	} else if *r.goAway != code {
		r.t.Errorf("GOAWAY says %v; want %v", *r.goAway, code)
	}
}

// flood writes until the sidecar ends the connection, at most n times. It
// returns how often it could.
func flood(n int, write func(i int) error) int {
	for i := range n {
		if write(i) != nil {
			return i
		}
	}
	return n
}

// heap is what is in use after a collection.
func heap() int64 {
	runtime.GC()
	var s runtime.MemStats
	runtime.ReadMemStats(&s)
	return int64(s.HeapAlloc)
}

// bounded runs an attack and fails the test where it makes the process keep more
// than so much, or run more goroutines than so many.
func bounded(t *testing.T, mib int64, goroutines int, attack func()) {
	t.Helper()
	memory, running := heap(), runtime.NumGoroutine()
	most := running
	done, watched := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(watched)
		for {
			select {
			case <-done:
				return
			case <-time.After(2 * time.Millisecond):
				most = max(most, runtime.NumGoroutine())
			}
		}
	}()
	attack()
	close(done)
	<-watched
	if grown := heap() - memory; grown > mib<<20 {
		t.Errorf("the heap has grown by %d KiB; %d MiB are allowed", grown>>10, mib)
	}
	if most-running > goroutines {
		t.Errorf("%d goroutines more; %d are allowed", most-running, goroutines)
	}
}

func rapidReset(t *testing.T) {
	var reached atomic.Int64
	m := start(t, nil, serve(t, func(_ http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/others" {
			reached.Add(1)
		}
	}))
	const most = 5_000_000 // far more than the system's buffers hold
	bounded(t, 16, 1200, func() {
		r := m.attackH2(t, false)
		sent := flood(most, func(i int) error {
			id := uint32(2*i + 1)
			if err := r.headers(id, true, get2("/attack")); err != nil {
				return err
			}
			return r.fr.WriteRSTStream(id, xhttp2.ErrCodeCancel)
		})
		m.servesOthers()
		r.ended(xhttp2.ErrCodeEnhanceYourCalm)
		if sent == most || reached.Load() > 2000 {
			t.Errorf("%d streams were taken, of which %d reached the upstream", sent, reached.Load())
		}
	})
	m.tells(t, http2.ReasonRapidReset)
	m.servesOthers()
}

func madeYouReset(t *testing.T) {
	m := start(t, nil, serve(t, func(http.ResponseWriter, *http.Request) {}))
	const most = 5_000_000 // far more than the system's buffers hold
	bounded(t, 16, 1200, func() {
		r := m.attackH2(t, false)
		sent := flood(most, func(i int) error {
			id := uint32(2*i + 1)
			if err := r.headers(id, false, get2("/attack")); err != nil {
				return err
			}
			return r.fr.WriteRawFrame(xhttp2.FrameWindowUpdate, 0, id, []byte{0, 0, 0, 0}) // an increment of 0
		})
		m.servesOthers()
		r.ended(xhttp2.ErrCodeEnhanceYourCalm)
		if sent == most {
			t.Errorf("%d streams were taken", sent)
		}
	})
	m.tells(t, http2.ReasonRapidReset)
}

func continuationFlood(t *testing.T) {
	m := start(t, nil, serve(t, func(http.ResponseWriter, *http.Request) {}))
	const most = 5_000_000 // far more than the system's buffers hold
	bounded(t, 8, 100, func() {
		r := m.attackH2(t, false)
		if err := r.fr.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: r.block(get2("/"))}); err != nil {
			t.Fatal(err)
		}
		sent := flood(most, func(i int) error {
			return r.fr.WriteContinuation(1, false, r.block(fields{{fmt.Sprint("x-", i), strings.Repeat("a", 1000)}}))
		})
		m.servesOthers()
		r.ended(xhttp2.ErrCodeEnhanceYourCalm)
		if sent == most {
			t.Errorf("%d frames were taken", sent)
		}
	})
	m.tells(t, http2.ReasonContinuation)
}

// One field of 4 KiB in the table, which each further byte repeats.
func hpackBomb(t *testing.T) {
	m := start(t, nil, serve(t, func(_ http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/others" {
			t.Error("the bomb reached the upstream")
		}
	}))
	bounded(t, 8, 100, func() {
		r := m.attackH2(t, false)
		b := append([]byte(nil), r.block(get2("/", [2]string{"x", strings.Repeat("a", 3900)}))...)
		b = append(b, bytes.Repeat([]byte{0x80 | 62}, 16_000-len(b))...) // 62 is the newest entry of the table
		if err := r.fr.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: b, EndHeaders: true, EndStream: true}); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() bool {
			r.mu.Lock()
			defer r.mu.Unlock()
			return r.heads[1] == "431"
		}, "the bomb is not answered 431")
		m.servesOthers()
	})
	m.counts(t, http2.ReasonHeaderList)
}

func cookieFlood(t *testing.T) {
	m := start(t, nil, serve(t, func(_ http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/others" {
			t.Error("the cookies reached the upstream")
		}
	}))
	if got := m.raw("GET / HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("Cookie: a=b\r\n", 4000) + "\r\n"); !strings.HasPrefix(got, "HTTP/1.1 431") {
		t.Errorf("HTTP/1.1: answered %.40q", got)
	}
	r := m.attackH2(t, false)
	fs := get2("/")
	for i := range 4000 { // a crumb is a field of its own in HTTP/2
		fs = append(fs, [2]string{"cookie", fmt.Sprint("a=", i%10)})
	}
	if err := r.headers(1, true, fs); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.heads[1] == "431"
	}, "the cookies are not answered 431")
	m.counts(t, http2.ReasonHeaderList)
	m.servesOthers()
}

func settingsFlood(t *testing.T) {
	m := start(t, nil, serve(t, func(http.ResponseWriter, *http.Request) {}))
	r := m.attackH2(t, false)
	const most = 5_000_000 // far more than the system's buffers hold
	if sent := flood(most, func(i int) error {
		return r.fr.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: uint32(i)})
	}); sent == most {
		t.Error("all were taken")
	}
	m.servesOthers()
	r.ended(xhttp2.ErrCodeEnhanceYourCalm)
	m.tells(t, http2.ReasonSettingsFlood)
}

// The client does not even read the answers.
func pingFlood(t *testing.T) {
	m := start(t, nil, serve(t, func(http.ResponseWriter, *http.Request) {}))
	bounded(t, 8, 100, func() {
		r := m.attackH2(t, true)
		const most = 5_000_000
		if sent := flood(most, func(int) error { return r.fr.WritePing(false, [8]byte{1}) }); sent == most {
			t.Error("all were taken")
		}
		m.servesOthers()
	})
	m.tells(t, http2.ReasonPingFlood)
}

func emptyDataFlood(t *testing.T) {
	m := start(t, nil, serve(t, func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) }))
	r := m.attackH2(t, false)
	if err := r.headers(1, false, get2("/attack")); err != nil {
		t.Fatal(err)
	}
	const most = 5_000_000 // far more than the system's buffers hold
	if sent := flood(most, func(int) error { return r.fr.WriteData(1, false, nil) }); sent == most {
		t.Error("all were taken")
	}
	m.servesOthers()
	r.ended(xhttp2.ErrCodeEnhanceYourCalm)
	m.tells(t, http2.ReasonEmptyData)
}

// A client that reads nothing holds a window and some buffers, not the response.
func slowRead(t *testing.T, version int) {
	var written atomic.Int64
	stop := make(chan struct{})
	m := start(t, nil, serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/others" {
			return
		}
		b := make([]byte, 64<<10)
		for range 64 << 20 / len(b) {
			if n, err := w.Write(b); err != nil || n < len(b) {
				return
			}
			written.Add(int64(len(b)))
		}
	}))
	defer close(stop)
	const clients = 8
	bounded(t, 12, 200, func() {
		for range clients {
			if version == 2 {
				r := m.attackH2(t, true, xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: 1})
				if err := r.headers(1, true, get2("/large")); err != nil {
					t.Fatal(err)
				}
				continue
			}
			c := m.dial()
			_ = c.SetReadBuffer(4 << 10)
			_, _ = io.WriteString(c, "GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
		}
		last := int64(-1)
		eventually(t, func() bool { // the servers are held up
			now := written.Load()
			same := now == last
			last = now
			time.Sleep(300 * time.Millisecond)
			return same
		}, "the servers go on writing")
		m.servesOthers()
	})
	// What the kernel holds of loopback connections is megabytes; a response is 64.
	if each := written.Load() / clients; each > 16<<20 {
		t.Errorf("%d MiB of each response were taken from its server", each>>20)
	}
}

// A server that reads nothing holds its client up, and the sidecar keeps little.
func slowUpstream(t *testing.T) {
	release := make(chan struct{})
	m := start(t, nil, speak(t, func(c net.Conn, r *bufio.Reader) {
		head(r)
		<-release
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
	}))
	defer close(release)
	const size = 256 << 20
	bounded(t, 4, 20, func() {
		c := m.dial()
		_ = c.SetWriteDeadline(time.Now().Add(time.Second))
		_, _ = fmt.Fprintf(c, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", size)
		b := make([]byte, 1<<20)
		sent := flood(size/len(b), func(int) error { _, err := c.Write(b); return err })
		if sent > 32 {
			t.Errorf("%d MiB were taken for a server that reads nothing", sent)
		}
	})
}

func slowHead(t *testing.T) {
	t.Parallel() // it takes the ten seconds that a head may
	m := start(t, nil, serve(t, func(_ http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/others" {
			t.Error("half a head reached the upstream")
		}
	}))
	const clients = 50
	var wg sync.WaitGroup
	for range clients {
		c := m.dial()
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		stop := make(chan struct{})
		wg.Go(func() {
			_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n")
			for {
				select {
				case <-stop:
					return
				case <-time.After(500 * time.Millisecond):
				}
				if _, err := io.WriteString(c, "A: b\r\n"); err != nil {
					return
				}
			}
		})
		wg.Go(func() {
			defer close(stop)
			b, _ := io.ReadAll(c)
			if !strings.HasPrefix(string(b), "HTTP/1.1 408") {
				t.Errorf("answered %.60q", b)
			}
		})
	}
	began := time.Now()
	time.Sleep(time.Second)
	m.servesOthers()
	wg.Wait()
	if took := time.Since(began); took > 14*time.Second {
		t.Errorf("a byte now and then kept connections for %s", took)
	}
	m.tells(t, "head_timeout")
	m.servesOthers()
}

func slowBody(t *testing.T) {
	m := start(t, func(_ *table.Cluster, r *route.Route) { r.Timeout = 300 * time.Millisecond }, serve(t, func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) }))
	c := m.dial()
	_, _ = io.WriteString(c, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
			if _, err := io.WriteString(c, "x"); err != nil {
				return
			}
		}
	})
	m.servesOthers()
	began := time.Now()
	b, _ := io.ReadAll(c)
	close(stop)
	wg.Wait()
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("a byte now and then kept the request for %s", took)
	}
	if !strings.HasPrefix(string(b), "HTTP/1.1 408") && !strings.HasPrefix(string(b), "HTTP/1.1 504") {
		t.Errorf("answered %.60q", b)
	}
	if line := m.logged(); line["error.message"] == nil && m.logged()["error.message"] == nil {
		t.Error("the log has no reason")
	}
}

// smuggle is a row whose requests are refused before the upstream hears of a
// whole one: what follows them on the connection is not looked at.
func smuggle(requests ...string) func(t *testing.T) {
	return func(t *testing.T) {
		whole := make(chan string, 100)
		m := start(t, nil, serve(t, func(_ http.ResponseWriter, r *http.Request) {
			if _, err := io.Copy(io.Discard, r.Body); err == nil && r.URL.Path != "/others" {
				whole <- r.Method + " " + r.URL.String()
			}
		}))
		for _, request := range requests {
			before := counted(t, m.registry, "outrigger_protocol_errors_total", "downstream")
			got := m.raw(request + "GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n")
			refused := strings.HasPrefix(got, "HTTP/1.1 4") || strings.HasPrefix(got, "HTTP/1.1 501") // a coding that is not known (RFC 9112, 6.1)
			if !refused || strings.Count(got, "x-outrigger-response-flags") != 1 || !strings.Contains(strings.ToLower(got), "connection: close") {
				t.Errorf("%.80q: answered %.120q", request, got)
			}
			line := m.logged()
			if line["outrigger.response_flags"] != "DPE" || line["error.message"] == nil {
				t.Errorf("%.80q: logged %v", request, line)
			}
			if counted(t, m.registry, "outrigger_protocol_errors_total", "downstream") != before+1 {
				t.Errorf("%.80q: not counted", request)
			}
		}
		m.servesOthers()
		select {
		case r := <-whole:
			t.Errorf("%s reached the upstream", r)
		default:
		}
	}
}

// counts waits for a reason to be counted: of a stream that is refused before
// its head is known, no line can be written.
func (m *mesh) counts(t *testing.T, reason string) {
	t.Helper()
	eventually(t, func() bool {
		return counted(t, m.registry, "outrigger_protocol_errors_total", "downstream", reason) > 0
	}, reason+" is not counted")
}

func eventually(t *testing.T, ok func() bool, why string) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Error(why)
			return
		}
	}
}

// refusedStreams sends each section as a request of its own: each is reset, for
// this reason, and the connection serves on.
func refusedStreams(t *testing.T, reason string, sections ...fields) {
	t.Helper()
	m := start(t, nil, serve(t, func(_ http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/others" {
			t.Errorf("%s %s %v reached the upstream", r.Method, r.URL, r.Header)
		}
	}))
	r := m.attackH2(t, false)
	for i, fs := range sections {
		id := uint32(2*i + 1)
		before := counted(t, m.registry, "outrigger_protocol_errors_total", "downstream")
		if err := r.headers(id, true, fs); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() bool {
			r.mu.Lock()
			defer r.mu.Unlock()
			return r.resets[id] == xhttp2.ErrCodeProtocol
		}, fmt.Sprintf("%q is not reset", fs))
		eventually(t, func() bool {
			return counted(t, m.registry, "outrigger_protocol_errors_total", "downstream") > before
		}, fmt.Sprintf("%q is not counted", fs))
	}
	if reason != "" {
		m.counts(t, reason)
	}
	last := uint32(2*len(sections) + 1)
	if err := r.headers(last, true, get2("/others")); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.heads[last] == "200"
	}, "the connection does not serve a good request")
}

// What would be another request, header or body in HTTP/1.1 never becomes one.
func downgrade(t *testing.T) {
	with := func(name, value string) fields { return get2("/", [2]string{name, value}) }
	pseudo := func(name, value string) fields {
		fs := get2("/")
		for i := range fs {
			if fs[i][0] == name {
				fs[i][1] = value
			}
		}
		return fs
	}
	refusedStreams(t, "",
		with("a", "b\r\nX-Smuggled: c"), with("a", "b\nc"), with("a", "b\rc"), with("a", "b\x00c"), with("a", "\r\n\r\nGET / HTTP/1.1"),
		with("a\r\nb", "c"), with("a: b\r\nc", "d"), with("a b", "c"), with("a:", "b"), with("", "b"), with("A", "b"), with("a\x00", "b"),
		with("connection", "close"), with("transfer-encoding", "chunked"), with("keep-alive", "1"), with("upgrade", "h2c"), with("proxy-connection", "close"), with("te", "gzip"),
		with(":path", "/again"), with(":unknown", "a"), with(":status", "200"),
		append(fields{{"a", "b"}}, get2("/")...),
		pseudo(":path", "/ HTTP/1.1\r\nX: y"), pseudo(":path", "/a b"), pseudo(":path", ""), pseudo(":path", "a"), pseudo(":path", "/\x00"), pseudo(":path", "http://b/"), pseudo(":path", "/#a"),
		pseudo(":method", "GET / HTTP/1.1\r\nX: y\r\n"), pseudo(":method", ""), pseudo(":method", "G T"),
		pseudo(":authority", "a\r\nX: y"), pseudo(":authority", "a/b"), pseudo(":scheme", "http\r\nX: y"), pseudo(":scheme", "ftp"),
		fields{{":method", "GET"}, {":scheme", "http"}, {":authority", "a"}}, fields{{":scheme", "http"}, {":authority", "a"}, {":path", "/"}}, fields{{":method", "GET"}, {":authority", "a"}, {":path", "/"}},
		fields{{":method", "CONNECT"}, {":scheme", "http"}, {":authority", "a"}, {":path", "/"}}, fields{{":method", "CONNECT"}})
}

// A body that is longer or shorter than it says is cut: the upstream reads no
// whole request, and no second one.
func lyingLengths(t *testing.T) {
	whole := make(chan string, 100)
	m := start(t, nil, serve(t, func(_ http.ResponseWriter, r *http.Request) {
		if b, err := io.ReadAll(r.Body); err == nil && r.URL.Path != "/others" {
			whole <- fmt.Sprintf("%s %s %q", r.Method, r.URL, b)
		}
	}))
	r := m.attackH2(t, false)
	id := uint32(1)
	for _, c := range []struct {
		length string
		body   []string
	}{
		{"10", []string{"short"}}, {"3", []string{"longer", ""}}, {"5", []string{"hello", "GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"}}, {"5, 5", []string{"hello"}}, {"+5", []string{"hello"}}, {"-1", []string{"a"}},
	} {
		fs := get2("/attack", [2]string{"content-length", c.length})
		fs[0][1] = "POST"
		if err := r.headers(id, false, fs); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond) // the head is on its way
		for i, b := range c.body {
			if err := r.fr.WriteData(id, i == len(c.body)-1, []byte(b)); err != nil {
				t.Fatal(err)
			}
		}
		eventually(t, func() bool {
			r.mu.Lock()
			defer r.mu.Unlock()
			code, reset := r.resets[id]
			// What was whole before the lie may have been answered, which ends the stream.
			return reset && (code == xhttp2.ErrCodeProtocol || c.length == "5" && code == xhttp2.ErrCodeNo)
		}, fmt.Sprintf("a length of %s with %q is not reset", c.length, c.body))
		id += 2
	}
	m.counts(t, http2.ReasonLength)
	m.servesOthers()
	for len(whole) > 0 {
		if got := <-whole; got != `POST /attack "hello"` { // whole before the lie was told: what is too much went nowhere
			t.Errorf("%s reached the upstream", got)
		}
	}
}

// Connection may strip what the client has sent, not what the sidecar says.
func hopByHop(t *testing.T) {
	seen := make(chan http.Header, 1)
	m := start(t, nil, serve(t, func(_ http.ResponseWriter, r *http.Request) { seen <- r.Header.Clone() }))
	for _, more := range []string{"", "X-Request-Id: mine\r\nTraceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n"} {
		m.raw("GET / HTTP/1.1\r\nHost: x\r\n" + more + "Connection: close, x-forwarded-for, traceparent, x-request-id, x-outrigger-attempt, x-mine\r\nX-Mine: hop\r\n\r\n")
		h := <-seen
		for _, name := range []string{"Traceparent", "X-Request-Id", "X-Outrigger-Attempt"} {
			if h.Get(name) == "" {
				t.Errorf("with %q: %s was stripped: %v", more, name, h)
			}
		}
		if h.Get("X-Mine") != "" || h.Get("Connection") != "" {
			t.Errorf("with %q: a header of one hop went on: %v", more, h)
		}
	}
	for _, name := range []string{"host", "content-length", "transfer-encoding"} { // what says where a message goes and ends
		got := m.raw("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nConnection: close, " + name + "\r\n\r\nhello")
		if !strings.HasPrefix(got, "HTTP/1.1 4") {
			select {
			case h := <-seen:
				if strings.HasPrefix(got, "HTTP/1.1 200") && h.Get("Content-Length") == "5" {
					continue
				}
				t.Errorf("Connection: %s: answered %.60q, seen %v", name, got, h)
			default:
				t.Errorf("Connection: %s: answered %.60q", name, got)
			}
		}
	}
}

// echoTarget answers the request target as its bytes came.
func echoTarget(t *testing.T) string {
	return speak(t, func(c net.Conn, r *bufio.Reader) {
		for {
			line, err := r.ReadString('\n')
			if err != nil {
				return
			}
			head(r)
			parts := strings.Split(line, " ")
			_, _ = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(parts[1]), parts[1])
		}
	})
}

// targetOf is what the upstream got of a target; empty where it was refused.
func (m *mesh) targetOf(target string) string {
	m.t.Helper()
	resp, err := http.ReadResponse(bufio.NewReader(strings.NewReader(m.raw("GET "+target+" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))), nil)
	if err != nil {
		m.t.Fatalf("%q: %v", target, err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		return ""
	}
	return string(b)
}

func oddQueries(t *testing.T) {
	m := start(t, nil, echoTarget(t))
	for _, q := range []string{"a=%zz", "a=b;c=d", "a=%", "&&=&", "a=b?c", "%00", "%2f..%2f", "a[]=1", "+", "a=/../b", ""} {
		if got := m.targetOf("/p?" + q); got != "/p?"+q {
			t.Errorf("?%s is forwarded as %q", q, got)
		}
	}
}

// Whatever way /admin is written, the route of /admin matches or it is refused;
// and what was matched is what the upstream sees.
func oddPaths(t *testing.T) {
	m := start(t, nil, echoTarget(t))
	m.routes(route.Route{Name: "admin", Match: route.Match{Prefix: "/admin"}, Clusters: m.route.Clusters}, m.route)
	passed := 0
	for _, target := range []string{
		"/admin", "//admin", "///admin", "/./admin", "/a/../admin", "/%61dmin", "/%61%64%6d%69%6e", "/admin/", "/admin//x", "/admin/./x", "/admin/x/../y", "/a/%2e%2e/admin", "/a/.%2e/admin", "/.//admin",
		"/admin;a=b", "/admin;a=b/x", "/;a/admin", "/a/..;x/admin", "/..;/admin", "/%2e/admin", "/admin%2fx", "/%2fadmin", "/a%2f..%2fadmin", "/a/..%5cadmin", "\\admin", "/admin%00", "/admin#x", "/admin%23", "/admin%3fx",
		"/ADMIN", "/adm%69n%20", "http://x/admin", "http://x//admin", "http://x/a/../admin", "/a/b/../../admin", "/a//../admin", "/%2561dmin",
	} {
		got := m.targetOf(target)
		line := m.logged()
		if got == "" {
			if line["outrigger.response_flags"] != "DPE" {
				t.Errorf("%s: refused, and logged %v", target, line)
			}
			continue
		}
		passed++
		if line["url.path"] != got {
			t.Errorf("%s: matched as %v, forwarded as %q", target, line["url.path"], got)
		}
		if again := m.targetOf(got); again != got {
			t.Errorf("%s: becomes %q, and that becomes %q", target, got, again)
		}
		m.logged()
		// What a server makes of it that decodes and cleans.
		u, err := url.ParseRequestURI(got)
		if err != nil {
			t.Errorf("%s: forwarded as %q, which is no URI: %v", target, got, err)
			continue
		}
		clean := path.Clean(u.Path)
		if admin := clean == "/admin" || strings.HasPrefix(clean, "/admin/"); admin != (line["outrigger.route"] == "admin") {
			t.Errorf("%s: a server reads %q, and the route was %v", target, clean, line["outrigger.route"])
		}
	}
	if passed < 10 {
		t.Errorf("only %d ways were passed on", passed)
	}
}

// routes replaces those of the destination.
func (m *mesh) routes(rs ...route.Route) {
	m.table.Store(&table.Table{
		Version:      "v2",
		Destinations: map[string]*table.Destination{key: {Key: key, Protocol: "http", Cluster: key, Routes: &route.Config{Name: key, Routes: rs}}},
		Clusters:     map[string]*table.Cluster{key: &m.cluster},
	})
}

// get is not GET (RFC 9110, 9.1), and no method that is registered is in lower
// case: it is refused, so that no rule can be passed by with it.
func methodCase(t *testing.T) {
	var sections []fields
	for _, method := range []string{"get", "Get", "gET", "post", "connect"} {
		fs := get2("/")
		fs[0][1] = method
		sections = append(sections, fs)
	}
	refusedStreams(t, http2.ReasonPseudoHeader, sections...)
}

// A rule for one value does not match where another came beside it.
func duplicates(t *testing.T) {
	seen := make(chan http.Header, 1)
	m := start(t, nil, serve(t, func(_ http.ResponseWriter, r *http.Request) { seen <- r.Header.Clone() }))
	m.routes(route.Route{Name: "admins", Match: route.Match{Headers: []route.Value{{Name: "x-role", Exact: "admin"}}}, Clusters: m.route.Clusters}, m.route)
	for _, c := range []struct{ headers, want string }{
		{"X-Role: admin\r\n", "admins"}, {"X-Role: admin\r\nx-role: user\r\n", "default"}, {"X-Role: user\r\nX-ROLE: admin\r\n", "default"}, {"X-Role: admin\r\nX-Role: admin\r\n", "default"}, {"X-Role: admin, user\r\n", "default"},
	} {
		m.raw("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + c.headers + "\r\n")
		if line := m.logged(); line["outrigger.route"] != c.want {
			t.Errorf("%q: route %v; want %s", c.headers, line["outrigger.route"], c.want)
		}
		if h := <-seen; len(h.Values("X-Role")) != strings.Count(c.headers, "\r\n") {
			t.Errorf("%q: the upstream saw %v", c.headers, h)
		}
	}
}

// Names with underscores pass, for applications use them, and are other names
// than those with hyphens. CGI and its heirs take both for one, so that a claim
// is one in either spelling.
func underscores(t *testing.T) {
	seen := make(chan http.Header, 1)
	app := serve(t, func(_ http.ResponseWriter, r *http.Request) { seen <- r.Header.Clone() })
	m := start(t, nil)
	m.addr = m.inbound("http", app, nil)
	m.raw("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX_Mine: yes\r\nX_Forwarded_Client_Cert: URI=spiffe://a/ns/b/sa/c\r\nx-forwarded_client-cert: d\r\nX_Outrigger_Identity: e\r\nX_Envoy_Internal: true\r\n\r\n")
	h := <-seen
	if h.Get("X_mine") != "yes" {
		t.Errorf("a name of the application's was changed: %v", h)
	}
	for name := range h {
		if plain := strings.ReplaceAll(strings.ToLower(name), "_", "-"); plain == "x-forwarded-client-cert" || strings.HasPrefix(plain, "x-outrigger-") || strings.HasPrefix(plain, "x-envoy-") {
			t.Errorf("%s reached the application", name)
		}
	}
}

// Only a handshake says who a caller is, in either version of HTTP.
func claims(t *testing.T) {
	const id = "spiffe://cluster.local/ns/shop/sa/admin"
	for _, version := range []int{1, 2} {
		seen := make(chan http.Header, 1)
		app := serveIn(t, version, func(_ http.ResponseWriter, r *http.Request) { seen <- r.Header.Clone() })
		m := start(t, nil)
		m.addr = m.inbound("http", app, nil)
		r := bridge{m, clientIn(t, version)}.request("GET", "/", nil)
		for _, name := range []string{"X-Forwarded-Client-Cert", "x-forwarded-CLIENT-cert", "X-Envoy-Internal", "X-Envoy-Peer-Metadata", "X-Envoy-Original-Path", "X-Outrigger-Identity", "X-Outrigger-Breaker"} {
			r.Header[name] = []string{"URI=" + id}
		}
		r.Header.Set("X-Forwarded-For", "10.0.0.1")
		bridge{m, clientIn(t, version)}.send(r)
		h := <-seen
		for name, values := range h {
			if strings.Contains(strings.Join(values, ","), id) {
				t.Errorf("HTTP/%d: %s: %q reached the application", version, name, values)
			}
		}
		if h.Get("X-Forwarded-For") != "10.0.0.1" { // nothing reads it as an identity
			t.Errorf("HTTP/%d: X-Forwarded-For: %q", version, h.Get("X-Forwarded-For"))
		}
		if line := m.logged(); strings.Contains(fmt.Sprint(line), id) {
			t.Errorf("HTTP/%d: logged as an identity: %v", version, line)
		}
	}
	t.Run("of a proved caller", func(t *testing.T) {
		seen := make(chan http.Header, 1)
		app := serve(t, func(_ http.ResponseWriter, r *http.Request) { seen <- r.Header.Clone() })
		s := startSecured(t, mtlstest.New(t, "cluster.local"), "http", app, true, false, paymentsID)
		s.caller.do("GET", "/", nil, "X-Forwarded-Client-Cert", "URI="+id, "X_forwarded_client_cert", "URI="+id)
		h := <-seen
		if got := h.Values("X-Forwarded-Client-Cert"); len(got) != 1 || !strings.Contains(got[0], storefrontID) {
			t.Errorf("the application was told %q", got)
		}
		if strings.Contains(fmt.Sprint(h), id) {
			t.Errorf("a claim reached the application: %v", h)
		}
	})
}

func connect(t *testing.T) {
	m := start(t, nil, serve(t, func(_ http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodConnect {
			t.Error("CONNECT reached the upstream")
		}
	}))
	for _, request := range []string{"CONNECT x:443 HTTP/1.1\r\nHost: x:443\r\n\r\n", "CONNECT / HTTP/1.1\r\nHost: x\r\n\r\n", "CONNECT x:443 HTTP/1.1\r\nHost: y:443\r\n\r\n"} {
		if got := m.raw(request); !strings.HasPrefix(got, "HTTP/1.1 4") {
			t.Errorf("%q: %.60q", request, got)
		}
		if line := m.logged(); line["outrigger.response_flags"] != "DPE" || line["error.message"] == nil {
			t.Errorf("%q: logged %v", request, line)
		}
	}
	r := m.attackH2(t, false)
	if err := r.headers(1, false, fields{{":method", "CONNECT"}, {":authority", "x:443"}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.heads[1] == "405"
	}, "CONNECT over HTTP/2 is not answered 405")
	m.servesOthers()

	unasked := start(t, nil, speak(t, func(c net.Conn, r *bufio.Reader) {
		head(r)
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\nHTTP/1.1 200 OK\r\n\r\n")
	}))
	if got := unasked.raw("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); !strings.HasPrefix(got, "HTTP/1.1 502") {
		t.Errorf("an upstream that switches unasked: %.60q", got)
	}
	if line := unasked.logged(); line["outrigger.response_flags"] != "UPE" || line["error.message"] == nil {
		t.Errorf("logged %v", line)
	}
}

// What is missing or broken is answered, not guessed.
func failClosed(t *testing.T) {
	server := serve(t, func(_ http.ResponseWriter, r *http.Request) { t.Errorf("%s reached the upstream", r.URL) })
	m := start(t, nil, server)
	good := *m.table.Load()
	destination := func(change func(*table.Destination)) *table.Table {
		d := *good.Destinations[key]
		change(&d)
		return &table.Table{Destinations: map[string]*table.Destination{key: &d}, Clusters: good.Clusters}
	}
	for name, c := range map[string]struct {
		table *table.Table
		want  int
	}{
		"nothing has arrived":       {&table.Table{}, 503},
		"the service is missing":    {destination(func(d *table.Destination) { d.Missing = true }), 503},
		"no routes":                 {destination(func(d *table.Destination) { d.Routes = nil }), 503},
		"no route matches":          {destination(func(d *table.Destination) { d.Routes = &route.Config{} }), 404},
		"the cluster is missing":    {&table.Table{Destinations: good.Destinations}, 500},
		"a route without a backend": {destination(func(d *table.Destination) { d.Routes = &route.Config{Routes: []route.Route{{Name: "empty"}}} }), 500},
		"no endpoint":               {&table.Table{Destinations: good.Destinations, Clusters: map[string]*table.Cluster{key: {Name: key}}}, 503},
		"TLS is demanded, and there is no identity": {&table.Table{Destinations: good.Destinations, Clusters: map[string]*table.Cluster{key: {
			Name: key, TLS: &table.TLS{Identities: []string{paymentsID}},
			Endpoints: []balance.Endpoint{{Address: m.cluster.Endpoints[0].Address, Instance: "x", Healthy: true, Weight: 1, TLS: true}},
		}}}, 503},
	} {
		m.table.Store(c.table)
		resp, _ := m.do("GET", "/"+url.PathEscape(name), nil)
		if resp.StatusCode != c.want {
			t.Errorf("%s: %d; want %d", name, resp.StatusCode, c.want)
		}
		if line := m.logged(); line["error.message"] == nil {
			t.Errorf("%s: logged without a reason: %v", name, line)
		}
	}
}

func plaintext(t *testing.T) {
	app := serve(t, func(http.ResponseWriter, *http.Request) { t.Error("plaintext reached the application") })
	s := startSecured(t, mtlstest.New(t, "cluster.local"), "http", app, true, false, paymentsID)
	m := s.callee
	m.addr = s.inbound
	for _, said := range []string{"GET / HTTP/1.1\r\nHost: x\r\n\r\n", xhttp2.ClientPreface, "anything at all, for longer than a detection waits"} {
		if got := m.raw(said); strings.Contains(got, "200") {
			t.Errorf("%.20q: answered %.60q", said, got)
		}
		if line := m.logged(); line["outrigger.response_flags"] != "DPE" || line["error.message"] == nil {
			t.Errorf("%.20q: logged %v", said, line)
		}
	}
	m.counts(t, "plaintext_refused")
	if _, err := net.Dial("tcp", s.inbound); err != nil && !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}
