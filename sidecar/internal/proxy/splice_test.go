package proxy_test

import (
	"bytes"
	"crypto/sha256"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"testing"
	"time"
)

// random is a body that no other one equals.
func random(size int) []byte {
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(rand.Uint32())
	}
	return b
}

// Large bodies of known length come whole and leave both connections fit for the
// next request.
func TestLargeBodiesAreCarriedByTheKernel(t *testing.T) {
	bodies := map[string][]byte{}
	for _, size := range []int{16 << 10, 32<<10 - 1, 32 << 10, 64 << 10, 1<<20 + 7, 8 << 20} {
		bodies["/"+strconv.Itoa(size)] = random(size)
	}
	m := start(t, nil, serve(t, func(w http.ResponseWriter, r *http.Request) {
		b := bodies[r.URL.Path]
		w.Header().Set("Content-Length", strconv.Itoa(len(b)))
		for len(b) > 0 { // in pieces that arrive apart
			n := min(len(b), 100_000)
			_, _ = w.Write(b[:n])
			b = b[n:]
			_ = http.NewResponseController(w).Flush()
		}
	}))
	b := bridge{m, clientIn(t, 1)}
	for range 3 {
		for path, want := range bodies {
			_, got := b.send(b.request("GET", path, nil))
			if sha256.Sum256(got) != sha256.Sum256(want) {
				t.Fatalf("%s: %d bytes, or others", path, len(got))
			}
			if line := m.logged(); line["http.response.body.bytes"] != float64(len(want)) || line["outrigger.response_flags"] != "-" {
				t.Errorf("%v", line)
			}
		}
	}
	if u := m.usage(); u.Connections != 1 {
		t.Errorf("%d connections to the server; want the one, used again", u.Connections)
	}
}

// long is a server whose body of 1 MiB stops after half of it until the test
// ends, or is cut there.
func long(t *testing.T, cut bool) string {
	return serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(1<<20))
		_, _ = w.Write(bytes.Repeat([]byte("x"), 512<<10))
		_ = http.NewResponseController(w).Flush()
		if cut {
			panic(http.ErrAbortHandler)
		}
		<-r.Context().Done()
	})
}

func TestCutLargeBodyIsNotTakenForAWholeOne(t *testing.T) {
	m := start(t, nil, long(t, true))
	b := bridge{m, clientIn(t, 1)}
	resp, err := b.client.Do(b.request("GET", "/", nil))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if n, err := io.Copy(io.Discard, resp.Body); err == nil || n > 512<<10 {
		t.Errorf("%d bytes and %v", n, err)
	}
	if line := m.logged(); line["outrigger.response_flags"] != "UC" {
		t.Errorf("%v", line)
	}
}

func TestClientThatLeavesALargeBody(t *testing.T) {
	m := start(t, nil, long(t, false))
	c := m.dial()
	_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	if _, err := io.CopyN(io.Discard, net.Conn(c), 400<<10); err != nil {
		t.Fatal(err)
	}
	_ = c.SetLinger(0)
	_ = c.Close()
	if line := m.logged(); line["outrigger.response_flags"] != "DC" {
		t.Errorf("%v", line)
	}
}

// A client that reads slowly is waited for, and gets everything.
func TestSlowReaderOfALargeBody(t *testing.T) {
	want := random(4 << 20)
	m := start(t, nil, serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(len(want)))
		_, _ = w.Write(want)
	}))
	c := m.dial()
	_ = c.SetReadBuffer(64 << 10)
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	var got bytes.Buffer
	for pauses := 0; ; {
		_, err := io.CopyN(&got, c, 512<<10)
		if err != nil {
			break
		}
		if pauses < 4 { // longer than the sidecar waits before it looks whether the client is there
			pauses++
			time.Sleep(150 * time.Millisecond)
		}
	}
	if !bytes.HasSuffix(got.Bytes(), want) {
		t.Errorf("%d bytes, or others", got.Len())
	}
}
