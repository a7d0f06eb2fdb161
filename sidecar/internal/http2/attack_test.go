package http2_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/http2"
)

// raw is a peer that does what it likes, frame by frame.
type raw struct {
	*xhttp2.Framer
	t   testing.TB
	nc  net.Conn
	buf bytes.Buffer
	enc *hpack.Encoder
}

func newRaw(t testing.TB, nc net.Conn) *raw {
	r := &raw{Framer: xhttp2.NewFramer(nc, nc), t: t, nc: nc}
	r.AllowIllegalWrites = true
	r.enc = hpack.NewEncoder(&r.buf)
	_ = nc.SetDeadline(in5s())
	t.Cleanup(func() { _ = nc.Close() })
	return r
}

// rawClient has sent the preface and its SETTINGS.
func rawClient(t testing.TB, addr string, settings ...xhttp2.Setting) *raw {
	t.Helper()
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	r := newRaw(t, nc)
	_, _ = io.WriteString(nc, xhttp2.ClientPreface)
	_ = r.WriteSettings(settings...)
	return r
}

// block is a compressed field section.
func (r *raw) block(fields ...string) []byte {
	r.buf.Reset()
	for i := 0; i < len(fields); i += 2 {
		_ = r.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return slices.Clone(r.buf.Bytes())
}

var request = []string{":method", "POST", ":scheme", "http", ":path", "/", ":authority", "svc.test"}

func (r *raw) headers(id uint32, end bool, fields ...string) error {
	return r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: id, BlockFragment: r.block(fields...), EndHeaders: true, EndStream: end})
}

// until reads frames until want says so, or the connection ends.
func (r *raw) until(want func(xhttp2.Frame) bool) (xhttp2.Frame, error) {
	for {
		f, err := r.ReadFrame()
		if err != nil {
			return nil, err
		}
		if want(f) {
			return f, nil
		}
	}
}

// goAway waits for a GOAWAY that is not the one of a graceful end.
func (r *raw) goAway() (xhttp2.ErrCode, string) {
	r.t.Helper()
	f, err := r.until(func(f xhttp2.Frame) bool { return f.Header().Type == xhttp2.FrameGoAway })
	if err != nil {
		r.t.Fatalf("no GOAWAY: %v", err)
	}
	g := f.(*xhttp2.GoAwayFrame)
	return g.ErrCode, string(g.DebugData())
}

// rst waits for a stream's RST_STREAM.
func (r *raw) rst(id uint32) xhttp2.ErrCode {
	r.t.Helper()
	f, err := r.until(func(f xhttp2.Frame) bool {
		h := f.Header()
		return h.Type == xhttp2.FrameRSTStream && h.StreamID == id || h.Type == xhttp2.FrameGoAway
	})
	if err != nil {
		r.t.Fatalf("no RST_STREAM: %v", err)
	}
	if g, ok := f.(*xhttp2.GoAwayFrame); ok {
		r.t.Fatalf("GOAWAY %v %q instead of RST_STREAM", g.ErrCode, g.DebugData())
	}
	return f.(*xhttp2.RSTStreamFrame).ErrCode
}

// drop reads and forgets, so that the other side can write.
func (r *raw) drop() (stop func()) {
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = io.Copy(io.Discard, r.nc) })
	return func() { _ = r.nc.Close(); wg.Wait() }
}

// hold serves with handlers that run until the test is over, whatever becomes
// of their streams.
func hold(t testing.TB, cfg *http2.Config) (s *server, running *atomic.Int64) {
	release := make(chan struct{})
	running = new(atomic.Int64)
	s = serve(t, cfg, func(s *http2.Stream) {
		running.Add(1)
		<-release
		running.Add(-1)
		s.Release()
	})
	t.Cleanup(func() { close(release) })
	return s, running
}

// mayAsk shows that other connections are served as if nothing happened.
func mayAsk(t *testing.T, addr string) {
	t.Helper()
	s, err := dial(t, addr, nil).Open()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Release()
	if r, err := roundTrip(s, post("/"), nil, []byte("hi"), nil); err != nil || string(r.body) != "hi" {
		t.Errorf("another connection: %v", err)
	}
}

// repeat writes n times; the server may have ended the connection before.
func repeat(n int, write func(i int) error) {
	for i := range n {
		if write(i) != nil {
			return
		}
	}
}

func TestFloodsEndTheConnection(t *testing.T) {
	opaque := func(i int) uint32 { return uint32(2*i + 1) }
	tests := []struct {
		name   string
		reason string
		code   xhttp2.ErrCode
		flood  func(r *raw)
	}{
		{"resets at once (CVE-2023-44487)", http2.ReasonRapidReset, xhttp2.ErrCodeEnhanceYourCalm, func(r *raw) {
			repeat(5000, func(i int) error {
				_ = r.headers(opaque(i), true, request...)
				return r.WriteRSTStream(opaque(i), xhttp2.ErrCodeCancel)
			})
		}},
		{"resets provoked by a window of nothing (CVE-2025-8671)", http2.ReasonRapidReset, xhttp2.ErrCodeEnhanceYourCalm, func(r *raw) {
			repeat(5000, func(i int) error {
				_ = r.headers(opaque(i), false, request...)
				return r.WriteWindowUpdate(opaque(i), 0)
			})
		}},
		{"resets provoked by a window too large", http2.ReasonRapidReset, xhttp2.ErrCodeEnhanceYourCalm, func(r *raw) {
			repeat(5000, func(i int) error {
				_ = r.headers(opaque(i), false, request...)
				return r.WriteWindowUpdate(opaque(i), 1<<31-1)
			})
		}},
		{"resets provoked by malformed heads", http2.ReasonRapidReset, xhttp2.ErrCodeEnhanceYourCalm, func(r *raw) {
			repeat(5000, func(i int) error { return r.headers(opaque(i), true, ":method", "GET") })
		}},
		{"resets provoked by a PRIORITY of the wrong size", http2.ReasonRapidReset, xhttp2.ErrCodeEnhanceYourCalm, func(r *raw) {
			repeat(5000, func(i int) error {
				_ = r.headers(opaque(i), false, request...)
				return r.WriteRawFrame(xhttp2.FramePriority, 0, opaque(i), []byte{0})
			})
		}},
		{"DATA behind the end", http2.ReasonRapidReset, xhttp2.ErrCodeEnhanceYourCalm, func(r *raw) {
			repeat(5000, func(i int) error {
				_ = r.headers(opaque(i), true, request...)
				return r.WriteData(opaque(i), true, nil)
			})
		}},
		{"endless CONTINUATION", http2.ReasonContinuation, xhttp2.ErrCodeEnhanceYourCalm, func(r *raw) {
			_ = r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: r.block(request...)})
			junk := r.block("x-junk", strings.Repeat("j", 8000))
			repeat(1000, func(int) error { return r.WriteContinuation(1, false, junk) })
		}},
		{"empty CONTINUATION", http2.ReasonContinuation, xhttp2.ErrCodeEnhanceYourCalm, func(r *raw) {
			_ = r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: r.block(request...)})
			repeat(10000, func(int) error { return r.WriteContinuation(1, false, nil) })
		}},
		{"SETTINGS", http2.ReasonSettingsFlood, xhttp2.ErrCodeEnhanceYourCalm, func(r *raw) {
			repeat(10000, func(int) error { return r.WriteSettings() })
		}},
		{"SETTINGS that acknowledge nothing", http2.ReasonSettingsFlood, xhttp2.ErrCodeEnhanceYourCalm, func(r *raw) {
			repeat(10000, func(int) error { return r.WriteSettingsAck() })
		}},
		{"SETTINGS with thousands of windows", http2.ReasonSettingsFlood, xhttp2.ErrCodeEnhanceYourCalm, func(r *raw) {
			_ = r.WriteSettings(slices.Repeat([]xhttp2.Setting{{ID: xhttp2.SettingInitialWindowSize, Val: 1}}, 2000)...)
		}},
		{"windows up and down (CVE-2019-9517)", http2.ReasonSettingsFlood, xhttp2.ErrCodeEnhanceYourCalm, func(r *raw) {
			_ = r.headers(1, false, request...)
			repeat(10000, func(i int) error {
				return r.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: uint32(i & 1)})
			})
		}},
		{"PING (CVE-2019-9512)", http2.ReasonPingFlood, xhttp2.ErrCodeEnhanceYourCalm, func(r *raw) {
			repeat(10000, func(int) error { return r.WritePing(false, [8]byte{}) })
		}},
		{"answers to PING", http2.ReasonPingFlood, xhttp2.ErrCodeEnhanceYourCalm, func(r *raw) {
			repeat(10000, func(int) error { return r.WritePing(true, [8]byte{}) })
		}},
		{"WINDOW_UPDATE", http2.ReasonWindowUpdateFlood, xhttp2.ErrCodeEnhanceYourCalm, func(r *raw) {
			repeat(50000, func(int) error { return r.WriteWindowUpdate(0, 1) })
		}},
		{"DATA without data (CVE-2019-9518)", http2.ReasonEmptyData, xhttp2.ErrCodeEnhanceYourCalm, func(r *raw) {
			_ = r.headers(1, false, request...)
			repeat(10000, func(int) error { return r.WriteData(1, false, nil) })
		}},
		{"DATA with padding only", http2.ReasonEmptyData, xhttp2.ErrCodeEnhanceYourCalm, func(r *raw) {
			_ = r.headers(1, false, request...)
			repeat(10000, func(int) error { return r.WriteDataPadded(1, false, nil, make([]byte, 10)) })
		}},
		{"PRIORITY (CVE-2019-9513)", http2.ReasonUselessFrames, xhttp2.ErrCodeEnhanceYourCalm, func(r *raw) {
			repeat(50000, func(i int) error { return r.WritePriority(uint32(i+1), xhttp2.PriorityParam{}) })
		}},
		{"unknown frames", http2.ReasonUselessFrames, xhttp2.ErrCodeEnhanceYourCalm, func(r *raw) {
			repeat(50000, func(int) error { return r.WriteRawFrame(0xbe, 0, 0, nil) })
		}},
		{"resets of what is over", http2.ReasonUselessFrames, xhttp2.ErrCodeEnhanceYourCalm, func(r *raw) {
			_ = r.headers(1, true, request...)
			repeat(50000, func(int) error { return r.WriteRSTStream(1, xhttp2.ErrCodeCancel) })
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s, running := hold(t, nil)
			before := runtime.NumGoroutine()
			r := rawClient(t, s.addr)
			var wg sync.WaitGroup
			wg.Go(func() { test.flood(r) })
			code, debug := r.goAway()
			if code != test.code || debug != test.reason {
				t.Errorf("GOAWAY %v %q, want %v %q", code, debug, test.code, test.reason)
			}
			if n := running.Load(); n > 250 {
				t.Errorf("%d handlers ran for one connection", n)
			}
			if n := runtime.NumGoroutine() - before; n > 250+20 {
				t.Errorf("%d goroutines more than before", n)
			}
			_ = r.nc.Close()
			wg.Wait()
			for deadline := in5s(); !strings.Contains(s.reasons(), test.reason); time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Errorf("counted %q, want %q", s.reasons(), test.reason)
					break
				}
			}
		})
	}
}

// A handler that still runs for a stream that was reset counts: else a client
// could have any number of them run.
func TestResetStreamsCountWhileTheirHandlersRun(t *testing.T) {
	s, running := hold(t, &http2.Config{MaxStreams: 10})
	r := rawClient(t, s.addr)
	for i := range uint32(100) {
		_ = r.headers(2*i+1, true, request...)
		_ = r.WriteRSTStream(2*i+1, xhttp2.ErrCodeCancel)
	}
	_ = r.WritePing(false, [8]byte{1})
	refused := 0
	if _, err := r.until(func(f xhttp2.Frame) bool {
		if f, ok := f.(*xhttp2.RSTStreamFrame); ok && f.ErrCode == xhttp2.ErrCodeRefusedStream {
			refused++
		}
		return f.Header().Type == xhttp2.FramePing
	}); err != nil {
		t.Fatal(err)
	}
	if n := running.Load(); n > 10 || refused != 90 {
		t.Errorf("%d handlers run and %d streams were refused, want 10 and 90", n, refused)
	}
}

// Handlers that end when their stream does keep no slot; then the ration of
// resets alone bounds what a client can have begun.
func TestResetsAreRationedWhereHandlersAreQuick(t *testing.T) {
	var began atomic.Int64
	s := serve(t, nil, func(s *http2.Stream) {
		began.Add(1)
		_, _, _ = s.ReadBody(true, in5s())
		s.Release()
	})
	r := rawClient(t, s.addr)
	var wg sync.WaitGroup
	wg.Go(func() {
		repeat(20000, func(i int) error {
			_ = r.headers(uint32(2*i+1), false, request...)
			return r.WriteRSTStream(uint32(2*i+1), xhttp2.ErrCodeCancel)
		})
	})
	if code, debug := r.goAway(); code != xhttp2.ErrCodeEnhanceYourCalm || debug != http2.ReasonRapidReset {
		t.Errorf("GOAWAY %v %q", code, debug)
	}
	_ = r.nc.Close()
	wg.Wait()
	if n := began.Load(); n > 1000 {
		t.Errorf("%d handlers began", n)
	}
}

// What one connection does must not be felt on another.
func TestAFloodedServerServesOthers(t *testing.T) {
	s := serve(t, nil, echo)
	r := rawClient(t, s.addr)
	stop := r.drop()
	defer stop()
	repeat(2000, func(i int) error {
		_ = r.headers(uint32(2*i+1), false, request...)
		return r.WriteRSTStream(uint32(2*i+1), xhttp2.ErrCodeCancel)
	})
	mayAsk(t, s.addr)
}

// A bomb is a table entry as large as it may be, and a section that refers to
// it with one byte each (CVE-2016-6581).
func TestSectionsThatUnpackToTooMuchAreRefused(t *testing.T) {
	s := serve(t, nil, echo)
	r := rawClient(t, s.addr)
	bomb := r.block(append(slices.Clone(request), "x-bomb", strings.Repeat("b", 3900))...)
	one := r.block("x-bomb", strings.Repeat("b", 3900))
	if len(one) != 1 {
		t.Fatalf("the bomb's field takes %d bytes", len(one))
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	bomb = append(bomb, bytes.Repeat(one, 12000)...)
	_ = r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: bomb, EndHeaders: true, EndStream: true})
	f, err := r.until(func(f xhttp2.Frame) bool { return f.Header().Type == xhttp2.FrameHeaders })
	if err != nil {
		t.Fatal(err)
	}
	fields, err := hpack.NewDecoder(4096, nil).DecodeFull(f.(*xhttp2.HeadersFrame).HeaderBlockFragment())
	if err != nil || len(fields) != 1 || fields[0].Value != "431" {
		t.Errorf("answered %v, %v", fields, err)
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 4<<20 {
		t.Errorf("the bomb of 48 MB made the process allocate %d bytes", n)
	}
	// The tables are still in step.
	_ = r.headers(3, true, request...)
	if _, err := r.until(func(f xhttp2.Frame) bool { return f.Header().StreamID == 3 && f.Header().Type == xhttp2.FrameHeaders }); err != nil {
		t.Errorf("the next request: %v", err)
	}
	if w := s.counted(1); !slices.Equal(w, []string{http2.ReasonHeaderList}) {
		t.Errorf("counted %q", w)
	}
}

func TestTooManyFieldsAreRefused(t *testing.T) {
	s := serve(t, &http2.Config{MaxHeaders: 20}, echo)
	r := rawClient(t, s.addr)
	fields := slices.Clone(request)
	for range 30 {
		fields = append(fields, "a", "b")
	}
	_ = r.headers(1, true, fields...)
	r.rst(1)
	if w := s.counted(1); !slices.Equal(w, []string{http2.ReasonHeaderList}) {
		t.Errorf("counted %q", w)
	}
}

// A connection error is one that leaves nothing to agree on.
func TestConnectionErrors(t *testing.T) {
	tests := []struct {
		name   string
		code   xhttp2.ErrCode
		reason string
		do     func(r *raw)
	}{
		{"DATA on an idle stream", xhttp2.ErrCodeProtocol, http2.ReasonStreamID, func(r *raw) { _ = r.WriteData(1, true, nil) }},
		{"RST_STREAM on an idle stream", xhttp2.ErrCodeProtocol, http2.ReasonStreamID, func(r *raw) { _ = r.WriteRSTStream(1, 0) }},
		{"WINDOW_UPDATE on an idle stream", xhttp2.ErrCodeProtocol, http2.ReasonStreamID, func(r *raw) { _ = r.WriteWindowUpdate(1, 1) }},
		{"an even stream", xhttp2.ErrCodeProtocol, http2.ReasonStreamID, func(r *raw) { _ = r.headers(2, true, request...) }},
		{"stream 0", xhttp2.ErrCodeProtocol, http2.ReasonStreamID, func(r *raw) { _ = r.headers(0, true, request...) }},
		{"a lower stream", xhttp2.ErrCodeProtocol, http2.ReasonStreamID, func(r *raw) {
			_ = r.headers(5, true, request...)
			_ = r.headers(3, true, request...)
		}},
		{"a stream twice", xhttp2.ErrCodeStreamClosed, http2.ReasonStreamClosed, func(r *raw) {
			_ = r.headers(1, true, request...)
			_, _ = r.until(func(f xhttp2.Frame) bool {
				return f.Header().StreamID == 1 && f.Header().Flags.Has(xhttp2.FlagDataEndStream)
			})
			_ = r.headers(1, true, request...)
		}},
		{"a frame inside a field section", xhttp2.ErrCodeProtocol, http2.ReasonFrame, func(r *raw) {
			_ = r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: r.block(request...)})
			_ = r.WritePing(false, [8]byte{})
		}},
		{"CONTINUATION of another stream", xhttp2.ErrCodeProtocol, http2.ReasonFrame, func(r *raw) {
			_ = r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: r.block(request...)})
			_ = r.WriteContinuation(3, true, nil)
		}},
		{"CONTINUATION of nothing", xhttp2.ErrCodeProtocol, http2.ReasonFrame, func(r *raw) { _ = r.WriteContinuation(1, true, nil) }},
		{"PUSH_PROMISE", xhttp2.ErrCodeProtocol, http2.ReasonPush, func(r *raw) {
			_ = r.WritePushPromise(xhttp2.PushPromiseParam{StreamID: 1, PromiseID: 2, EndHeaders: true})
		}},
		{"a frame too large", xhttp2.ErrCodeFrameSize, http2.ReasonFrameSize, func(r *raw) {
			_ = r.headers(1, false, request...)
			_ = r.WriteData(1, true, make([]byte, 16385))
		}},
		{"padding longer than the payload", xhttp2.ErrCodeProtocol, http2.ReasonFrame, func(r *raw) {
			_ = r.headers(1, false, request...)
			_ = r.WriteRawFrame(xhttp2.FrameData, xhttp2.FlagDataPadded, 1, []byte{5, 0})
		}},
		{"a broken index", xhttp2.ErrCodeCompression, http2.ReasonCompression, func(r *raw) {
			_ = r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0xff, 0x7f}, EndHeaders: true})
		}},
		{"a table larger than allowed", xhttp2.ErrCodeCompression, http2.ReasonCompression, func(r *raw) {
			_ = r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x3f, 0xe2, 0x1f}, EndHeaders: true})
		}},
		{"a string longer than allowed", xhttp2.ErrCodeCompression, http2.ReasonCompression, func(r *raw) {
			_ = r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x00, 0x7f, 0xff, 0xff, 0xff, 0x0f}})
		}},
		{"the connection's window beyond 2^31-1", xhttp2.ErrCodeFlowControl, http2.ReasonFlowControl, func(r *raw) {
			_ = r.WriteWindowUpdate(0, 1<<31-1)
		}},
		{"no window", xhttp2.ErrCodeProtocol, http2.ReasonFlowControl, func(r *raw) { _ = r.WriteWindowUpdate(0, 0) }},
		{"a window that lifts a stream's beyond 2^31-1", xhttp2.ErrCodeFlowControl, http2.ReasonFlowControl, func(r *raw) {
			_ = r.headers(1, false, request...)
			_ = r.WriteWindowUpdate(1, 1<<31-1-65535)
			_ = r.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: 65536})
		}},
		{"more data than the connection takes", xhttp2.ErrCodeFlowControl, http2.ReasonFlowControl, func(r *raw) {
			// Fifteen streams of 64 KiB, which no handler reads, and one more.
			repeat(20, func(i int) error {
				_ = r.headers(uint32(2*i+1), false, request...)
				repeat(4, func(int) error { return r.WriteData(uint32(2*i+1), false, make([]byte, 16000)) })
				return nil
			})
		}},
		{"SETTINGS of a stream", xhttp2.ErrCodeProtocol, http2.ReasonStreamID, func(r *raw) {
			_ = r.WriteRawFrame(xhttp2.FrameSettings, 0, 1, nil)
		}},
		{"SETTINGS of the wrong size", xhttp2.ErrCodeFrameSize, http2.ReasonFrameSize, func(r *raw) {
			_ = r.WriteRawFrame(xhttp2.FrameSettings, 0, 0, []byte{0})
		}},
		{"a SETTINGS ACK that says something", xhttp2.ErrCodeFrameSize, http2.ReasonFrameSize, func(r *raw) {
			_ = r.WriteRawFrame(xhttp2.FrameSettings, xhttp2.FlagSettingsAck, 0, make([]byte, 6))
		}},
		{"a push setting of 2", xhttp2.ErrCodeProtocol, http2.ReasonSetting, func(r *raw) {
			_ = r.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingEnablePush, Val: 2})
		}},
		{"a window of 2^31", xhttp2.ErrCodeFlowControl, http2.ReasonSetting, func(r *raw) {
			_ = r.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: 1 << 31})
		}},
		{"a frame size below the least", xhttp2.ErrCodeProtocol, http2.ReasonSetting, func(r *raw) {
			_ = r.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingMaxFrameSize, Val: 16383})
		}},
		{"PING of a stream", xhttp2.ErrCodeProtocol, http2.ReasonStreamID, func(r *raw) {
			_ = r.WriteRawFrame(xhttp2.FramePing, 0, 1, make([]byte, 8))
		}},
		{"PING of the wrong size", xhttp2.ErrCodeFrameSize, http2.ReasonFrameSize, func(r *raw) {
			_ = r.WriteRawFrame(xhttp2.FramePing, 0, 0, make([]byte, 7))
		}},
		{"GOAWAY of a stream", xhttp2.ErrCodeProtocol, http2.ReasonStreamID, func(r *raw) {
			_ = r.WriteRawFrame(xhttp2.FrameGoAway, 0, 1, make([]byte, 8))
		}},
		{"RST_STREAM of the wrong size", xhttp2.ErrCodeFrameSize, http2.ReasonFrameSize, func(r *raw) {
			_ = r.headers(1, false, request...)
			_ = r.WriteRawFrame(xhttp2.FrameRSTStream, 0, 1, make([]byte, 3))
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s, _ := hold(t, nil)
			if strings.Contains(test.name, "twice") {
				s = serve(t, nil, echo)
			}
			r := rawClient(t, s.addr)
			test.do(r)
			if code, debug := r.goAway(); code != test.code || debug != test.reason {
				t.Errorf("GOAWAY %v %q, want %v %q", code, debug, test.code, test.reason)
			}
		})
	}
}

// A stream error leaves the connection and its other streams alone.
func TestMalformedRequestsAreStreamErrors(t *testing.T) {
	with := func(fields ...string) []string { return append(slices.Clone(request), fields...) }
	tests := []struct {
		name   string
		reason string
		fields []string
	}{
		{"an upper-case name", http2.ReasonName, with("X-Upper", "1")},
		{"an empty name", http2.ReasonName, with("", "1")},
		{"a space in a name", http2.ReasonName, with("a b", "1")},
		{"a colon in a name", http2.ReasonName, with("a:b", "1")},
		{"CR in a value", http2.ReasonValue, with("a", "b\rc")},
		{"LF in a value", http2.ReasonValue, with("a", "b\nc: d")},
		{"NUL in a value", http2.ReasonValue, with("a", "b\x00")},
		{"a space before a value", http2.ReasonValue, with("a", " b")},
		{"a tab behind a value", http2.ReasonValue, with("a", "b\t")},
		{"LF in :path", http2.ReasonValue, []string{":method", "GET", ":scheme", "http", ":path", "/\nx", ":authority", "svc.test"}},
		{"a space in :path", http2.ReasonPath, []string{":method", "GET", ":scheme", "http", ":path", "/ HTTP/1.1", ":authority", "svc.test"}},
		{"an empty :path", http2.ReasonPath, []string{":method", "GET", ":scheme", "http", ":path", "", ":authority", "svc.test"}},
		{"an absolute :path", http2.ReasonPath, []string{":method", "GET", ":scheme", "http", ":path", "http://x/", ":authority", "svc.test"}},
		{":path * of GET", http2.ReasonPath, []string{":method", "GET", ":scheme", "http", ":path", "*", ":authority", "svc.test"}},
		{"no :path", http2.ReasonPseudoHeader, []string{":method", "GET", ":scheme", "http", ":authority", "svc.test"}},
		{"no :scheme", http2.ReasonPseudoHeader, []string{":method", "GET", ":path", "/", ":authority", "svc.test"}},
		{"another scheme", http2.ReasonPseudoHeader, []string{":method", "GET", ":scheme", "ftp", ":path", "/", ":authority", "svc.test"}},
		{"no :method", http2.ReasonPseudoHeader, []string{":scheme", "http", ":path", "/", ":authority", "svc.test"}},
		{"a method with a space", http2.ReasonPseudoHeader, []string{":method", "GET /x", ":scheme", "http", ":path", "/", ":authority", "svc.test"}},
		{"no authority", http2.ReasonHost, []string{":method", "GET", ":scheme", "http", ":path", "/"}},
		{"an authority with a user", http2.ReasonHost, []string{":method", "GET", ":scheme", "http", ":path", "/", ":authority", "me@svc.test"}},
		{"another host", http2.ReasonHost, with("host", "other.test")},
		{"two hosts", http2.ReasonHost, with("host", "svc.test", "host", "svc.test")},
		{":path twice", http2.ReasonPseudoHeader, append([]string{":path", "/a"}, request...)},
		{"an unknown pseudo-header", http2.ReasonPseudoHeader, append([]string{":protocol", "websocket"}, request...)},
		{"a :status", http2.ReasonPseudoHeader, append([]string{":status", "200"}, request...)},
		{"a late pseudo-header", http2.ReasonPseudoHeader, []string{":method", "GET", ":scheme", "http", ":path", "/", "a", "b", ":authority", "svc.test"}},
		{"connection", http2.ReasonConnectionField, with("connection", "close")},
		{"keep-alive", http2.ReasonConnectionField, with("keep-alive", "5")},
		{"proxy-connection", http2.ReasonConnectionField, with("proxy-connection", "close")},
		{"transfer-encoding", http2.ReasonConnectionField, with("transfer-encoding", "chunked")},
		{"upgrade", http2.ReasonConnectionField, with("upgrade", "h2c")},
		{"te", http2.ReasonConnectionField, with("te", "gzip")},
		{"te twice", http2.ReasonConnectionField, with("te", "trailers", "te", "trailers")},
		{"two lengths", http2.ReasonLength, with("content-length", "0", "content-length", "0")},
		{"a list of lengths", http2.ReasonLength, with("content-length", "0, 0")},
		{"a length with a sign", http2.ReasonLength, with("content-length", "+0")},
		{"a length without a body", http2.ReasonLength, with("content-length", "5")},
		{"CONNECT with a path", http2.ReasonPseudoHeader, []string{":method", "CONNECT", ":scheme", "http", ":path", "/", ":authority", "svc.test:80"}},
	}
	handle := func(s *http2.Stream) { t.Error("a handler ran"); s.Release() }
	s := serve(t, nil, handle)
	r := rawClient(t, s.addr)
	for i, test := range tests {
		id := uint32(2*i + 1)
		_ = r.headers(id, true, test.fields...)
		if code := r.rst(id); code != xhttp2.ErrCodeProtocol {
			t.Errorf("%s: %v", test.name, code)
		}
	}
	why := s.counted(len(tests))
	for i, test := range tests {
		if i >= len(why) || why[i] != test.reason {
			t.Errorf("%s: counted %q, want %q", test.name, why[min(i, len(why)):min(i+1, len(why))], test.reason)
		}
	}
}

// What comes behind the head can make a message malformed too.
func TestMalformedBodiesAreStreamErrors(t *testing.T) {
	length := append(slices.Clone(request), "content-length", "5")
	tests := []struct {
		name string
		code xhttp2.ErrCode
		do   func(r *raw)
	}{
		{"more than the length", xhttp2.ErrCodeProtocol, func(r *raw) { _ = r.headers(1, false, length...); _ = r.WriteData(1, false, []byte("123456")) }},
		{"less than the length", xhttp2.ErrCodeProtocol, func(r *raw) { _ = r.headers(1, false, length...); _ = r.WriteData(1, true, []byte("1234")) }},
		{"less than the length, with trailers", xhttp2.ErrCodeProtocol, func(r *raw) { _ = r.headers(1, false, length...); _ = r.headers(1, true, "a", "b") }},
		{"pseudo-headers in trailers", xhttp2.ErrCodeProtocol, func(r *raw) { _ = r.headers(1, false, request...); _ = r.headers(1, true, ":path", "/") }},
		{"connection fields in trailers", xhttp2.ErrCodeProtocol, func(r *raw) {
			_ = r.headers(1, false, request...)
			_ = r.headers(1, true, "transfer-encoding", "chunked")
		}},
		{"trailers that are not the end", xhttp2.ErrCodeProtocol, func(r *raw) { _ = r.headers(1, false, request...); _ = r.headers(1, false, "a", "b") }},
		{"DATA behind the end", xhttp2.ErrCodeStreamClosed, func(r *raw) { _ = r.headers(1, true, request...); _ = r.WriteData(1, true, nil) }},
		{"HEADERS behind the end", xhttp2.ErrCodeStreamClosed, func(r *raw) { _ = r.headers(1, true, request...); _ = r.headers(1, true, "a", "b") }},
		{"a window beyond 2^31-1", xhttp2.ErrCodeFlowControl, func(r *raw) { _ = r.headers(1, false, request...); _ = r.WriteWindowUpdate(1, 1<<31-1) }},
		{"more data than the stream takes", xhttp2.ErrCodeFlowControl, func(r *raw) {
			_ = r.headers(1, false, request...)
			repeat(5, func(int) error { return r.WriteData(1, false, make([]byte, 16000)) })
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			gone := make(chan error, 1)
			s := serve(t, nil, func(s *http2.Stream) {
				defer s.Release()
				wait := make(chan struct{})
				s.OnGone(func() { close(wait) })
				select {
				case <-wait:
				case <-time.After(5 * time.Second):
				}
				_, _, err := s.ReadBody(true, in5s())
				gone <- err
			})
			r := rawClient(t, s.addr)
			test.do(r)
			if code := r.rst(1); code != test.code {
				t.Errorf("RST_STREAM %v, want %v", code, test.code)
			}
			var se *http2.StreamError
			if err := <-gone; !errors.As(err, &se) || se.Remote || uint32(se.Code) != uint32(test.code) {
				t.Errorf("the handler was told %v", err)
			}
		})
	}
}

// A head that trickles in holds memory and, in a proxy, nothing else: it is
// given a time.
func TestSlowHeadsAreCut(t *testing.T) {
	for _, test := range []struct {
		name  string
		write func(r *raw)
	}{
		{"half a preface", func(r *raw) { _, _ = io.WriteString(r.nc, xhttp2.ClientPreface[:10]) }},
		{"no SETTINGS", func(r *raw) { _, _ = io.WriteString(r.nc, xhttp2.ClientPreface) }},
		{"half a HEADERS frame", func(r *raw) {
			_, _ = io.WriteString(r.nc, xhttp2.ClientPreface)
			_ = r.WriteSettings()
			_, _ = r.nc.Write([]byte{0, 0, 9, 1, 4, 0, 0, 0, 1, 0x82})
		}},
		{"no END_HEADERS", func(r *raw) {
			_, _ = io.WriteString(r.nc, xhttp2.ClientPreface)
			_ = r.WriteSettings()
			_ = r.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x82}})
			repeat(5, func(int) error { time.Sleep(30 * time.Millisecond); return r.WriteContinuation(1, false, []byte{0x86}) })
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := serve(t, &http2.Config{HeadTimeout: 100 * time.Millisecond}, echo)
			nc, err := net.Dial("tcp", s.addr)
			if err != nil {
				t.Fatal(err)
			}
			r := newRaw(t, nc)
			test.write(r)
			if code, debug := r.goAway(); code != xhttp2.ErrCodeEnhanceYourCalm || debug != http2.ReasonHeadTimeout {
				t.Errorf("GOAWAY %v %q", code, debug)
			}
		})
	}
}

// A client that opens its window and does not read blocks writes, which have a
// time; what is queued for it has a bound.
func TestAClientThatDoesNotReadIsCut(t *testing.T) {
	var wrote atomic.Int64
	s := serve(t, &http2.Config{WriteTimeout: 200 * time.Millisecond}, func(s *http2.Stream) {
		defer s.Release()
		if s.WriteHead(&http1.Head{Status: 200, Framing: http1.Chunked}, nil, false) != nil {
			return
		}
		b := make([]byte, 32<<10)
		for s.WriteData(b, false, in5s()) == nil {
			wrote.Add(int64(len(b)))
		}
	})
	r := rawClient(t, s.addr, xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: 1<<31 - 1})
	_ = r.nc.(*net.TCPConn).SetReadBuffer(64 << 10)
	_ = r.WriteWindowUpdate(0, 1<<31-1-65535)
	for i := range uint32(20) {
		_ = r.headers(2*i+1, true, request...)
	}
	for deadline := in5s(); !strings.Contains(s.reasons(), http2.ReasonWriteTimeout); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the connection is still there")
		}
	}
	// The kernel's buffers took some; the rest is one queue of 64 KiB.
	if n := wrote.Load(); n > 16<<20 {
		t.Errorf("%d bytes were taken for a client that reads nothing", n)
	}
}

// A window of nothing blocks one stream until its deadline, and no other.
func TestAStreamWithoutWindowWaitsAlone(t *testing.T) {
	errs := make(chan error, 1)
	s := serve(t, nil, func(s *http2.Stream) {
		defer s.Release()
		var h http1.Head
		_ = s.ReadHead(&h, time.Time{})
		_ = s.WriteHead(&http1.Head{Status: 200, Framing: http1.Chunked}, nil, false)
		if string(h.Target) == "/slow" {
			errs <- s.WriteData(make([]byte, 100), true, time.Now().Add(50*time.Millisecond))
			return
		}
		_ = s.WriteData(nil, true, in5s())
		_ = s.Flush()
	})
	r := rawClient(t, s.addr, xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: 0})
	_ = r.headers(1, true, ":method", "GET", ":scheme", "http", ":path", "/slow", ":authority", "svc.test")
	_ = r.headers(3, true, request...)
	if _, err := r.until(func(f xhttp2.Frame) bool {
		return f.Header().StreamID == 3 && f.Header().Type == xhttp2.FrameData
	}); err != nil {
		t.Fatal(err)
	}
	if code := r.rst(1); code != xhttp2.ErrCodeCancel {
		t.Errorf("RST_STREAM %v", code)
	}
	if err := <-errs; !strings.Contains(fmt.Sprint(err), "timeout") {
		t.Errorf("WriteData: %v", err)
	}
}

// Answers to control frames are queued for a client that does not read them
// only up to a bound.
func TestAnswersAreNotQueuedWithoutBound(t *testing.T) {
	s := serve(t, nil, echo)
	r := rawClient(t, s.addr)
	_ = r.nc.(*net.TCPConn).SetReadBuffer(4 << 10)
	repeat(100_000, func(int) error { return r.WritePing(false, [8]byte{}) })
	if w := s.counted(1); len(w) != 1 || w[0] != http2.ReasonPingFlood && w[0] != http2.ReasonQueue {
		t.Errorf("counted %q", w)
	}
}

// Drain tells the client first, and takes what it had sent before it knew.
func TestDrainIsFairToWhatIsOnItsWay(t *testing.T) {
	release := make(chan struct{})
	s := serve(t, nil, func(s *http2.Stream) { <-release; echo(s) })
	r := rawClient(t, s.addr)
	_ = r.headers(1, true, request...)
	_ = r.WritePing(false, [8]byte{})
	if _, err := r.until(func(f xhttp2.Frame) bool { return f.Header().Type == xhttp2.FramePing }); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	srv := s.conns[0]
	s.mu.Unlock()
	srv.Drain()
	f, err := r.until(func(f xhttp2.Frame) bool { return f.Header().Type == xhttp2.FrameGoAway })
	if err != nil || f.(*xhttp2.GoAwayFrame).LastStreamID != 1<<31-1 {
		t.Fatalf("the first GOAWAY: %v, %v", f, err)
	}
	f, err = r.until(func(f xhttp2.Frame) bool { return f.Header().Type == xhttp2.FramePing })
	if err != nil {
		t.Fatal(err)
	}
	_ = r.headers(3, false, request...)
	_ = r.WritePing(true, f.(*xhttp2.PingFrame).Data)
	f, err = r.until(func(f xhttp2.Frame) bool { return f.Header().Type == xhttp2.FrameGoAway })
	if err != nil || f.(*xhttp2.GoAwayFrame).LastStreamID != 3 {
		t.Fatalf("the second GOAWAY: %v, %v", f, err)
	}
	// Too late, and not an error: it is sent again on another connection.
	_ = r.headers(5, false, request...)
	_ = r.WriteData(5, true, []byte("x"))
	_ = r.WriteWindowUpdate(5, 1)
	_ = r.WriteRSTStream(5, xhttp2.ErrCodeCancel)
	_ = r.WriteData(3, true, []byte("y"))
	close(release)
	ended := map[uint32]bool{}
	if _, err := r.until(func(f xhttp2.Frame) bool {
		if f.Header().Flags.Has(xhttp2.FlagDataEndStream) && f.Header().StreamID != 0 {
			ended[f.Header().StreamID] = true
		}
		return f.Header().Type == xhttp2.FrameGoAway || f.Header().Type == xhttp2.FrameRSTStream
	}); !errors.Is(err, io.EOF) {
		t.Errorf("the end: %v", err)
	}
	if !ended[1] || !ended[3] || ended[5] {
		t.Errorf("ended: %v", ended)
	}
	if w := s.reasons(); w != "" {
		t.Errorf("counted %q", w)
	}
}
