package proxy_test

import (
	"io"
	"net/http"
	"net/netip"
	"runtime"
	"syscall"
	"testing"
	"time"
)

// An idle connection is a goroutine and at most 1 KiB of heap, whatever was said
// on it before. Its clients here are bare descriptors, which hold no heap.
func TestIdleConnectionsHoldLittle(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates for itself: there is nothing to measure")
	}
	const count, most = 1000, 1024
	m := start(t, nil, serve(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") }))
	m.quiet = true
	address := netip.MustParseAddrPort(m.addr)
	request, answer := []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"), make([]byte, 1024)
	connect := func() int {
		fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
		if err == nil {
			err = syscall.Connect(fd, &syscall.SockaddrInet4{Port: int(address.Port()), Addr: address.Addr().As4()})
		}
		if err == nil {
			_, err = syscall.Write(fd, request)
		}
		if err == nil {
			_, err = syscall.Read(fd, answer)
		}
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	heap := func() uint64 {
		var s runtime.MemStats
		for range 3 { // what pools keep goes with the second collection
			time.Sleep(20 * time.Millisecond)
			runtime.GC()
		}
		runtime.ReadMemStats(&s)
		return s.HeapAlloc
	}
	fds := make([]int, 0, count)
	first := connect() // pools, series and the connection to the server
	before, routines := heap(), runtime.NumGoroutine()
	for range count {
		fds = append(fds, connect())
	}
	each := (int64(heap()) - int64(before)) / count
	if each > most || runtime.NumGoroutine()-routines > count {
		t.Errorf("%d bytes of heap and %d goroutines for %d idle connections; want at most %d bytes and one goroutine each", each, runtime.NumGoroutine()-routines, count, most)
	}
	t.Logf("%d bytes of heap an idle connection", each)
	for _, fd := range append(fds, first) {
		_ = syscall.Close(fd)
	}
}
