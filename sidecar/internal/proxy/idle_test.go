package proxy_test

import (
	"io"
	"net/http"
	"net/netip"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"
)

// An idle connection is a goroutine and at most 1 KiB of heap, whatever was said
// on it before. Its clients here are bare descriptors, which hold no heap. What
// the runtime keeps on the heap for a goroutine that waits is measured beside it.
func TestIdleConnectionsHoldLittle(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates for itself: make test runs it once more without")
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
	after := heap()
	if n := runtime.NumGoroutine() - routines; n > count+5 {
		t.Errorf("%d goroutines for %d idle connections", n, count)
	}
	var wg sync.WaitGroup
	release := make(chan struct{})
	for range count {
		wg.Go(func() { <-release })
	}
	routine := (int64(heap()) - int64(after)) / count
	close(release)
	wg.Wait()
	each := (int64(after)-int64(before))/count - routine
	if each > most {
		t.Errorf("%d bytes of heap an idle connection; want at most %d", each, most)
	}
	t.Logf("an idle connection: %d bytes of heap, and a goroutine, which the runtime describes in %d", each, routine)
	for _, fd := range append(fds, first) {
		_ = syscall.Close(fd)
	}
}
