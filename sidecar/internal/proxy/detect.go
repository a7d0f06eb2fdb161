package proxy

import (
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/detect"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/route"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
)

const (
	// sniffTimeout is how long a client is waited for before its connection is
	// carried as bytes. A server that speaks first is that much slower, once.
	sniffTimeout = 50 * time.Millisecond
	// sniffGrace is for bytes that have arrived when the wait is over, but whose
	// reader had no processor yet.
	sniffGrace = time.Millisecond
	// greetingTimeout is how long after the beginning of a connection the first
	// bytes of a server count as its greeting. A server that gives up on a silent
	// client (HTTP's 408) takes longer.
	greetingTimeout = 5 * time.Second
)

// sniffed are buffers for the first bytes of connections.
var sniffed = sync.Pool{New: func() any { return new([detect.MaxBytes]byte) }}

// sniff reads from c until detect decides, sniffTimeout from the call at most; now
// is when c was accepted. It returns what it read, which the caller hands back
// with release when it has been sent on, and the decision, which is never More:
// what has not shown itself in time, or ended before, is Opaque. mem is told what
// was decided. Where it knows that the server of key speaks first, sniff returns
// at once with no bytes.
//
// Who is told Opaque and got no bytes should set stream.Memory, so that mem learns
// whether the server speaks first.
//
// The error is one of c, which is of no further use; there are no bytes then.
func (p *path) sniff(c net.Conn, mem *detect.Memory, key string, now time.Time) (early []byte, r detect.Result, err error) {
	if mem.ServerFirst(key, now) {
		return nil, detect.Result{Protocol: detect.Opaque}, nil
	}
	b, ok := sniffed.Get().(*[detect.MaxBytes]byte)
	if !ok {
		panic("proxy: the pool of first bytes holds something else")
	}
	n, r, err := sniffInto(b[:], c)
	if err != nil || n == 0 {
		sniffed.Put(b)
		return nil, r, err
	}
	if r.Protocol != detect.More {
		mem.Found(key, r.Protocol, now)
	} else {
		r.Protocol = detect.Opaque
	}
	return b[:n], r, nil
}

// release takes back what sniff returned. The bytes must not be used any more.
func release(early []byte) {
	if cap(early) == detect.MaxBytes {
		sniffed.Put((*[detect.MaxBytes]byte)(early[:detect.MaxBytes]))
	}
}

func sniffInto(b []byte, c net.Conn) (n int, r detect.Result, err error) {
	silent := detect.Result{Protocol: detect.Opaque}
	wait := sniffTimeout
	for {
		if err := c.SetReadDeadline(time.Now().Add(wait)); err != nil {
			return n, r, err
		}
		for {
			m, err := c.Read(b[n:])
			n += m
			if m > 0 {
				r = detect.Detect(b[:n])
			}
			if r.Protocol != detect.More {
				return n, r, c.SetReadDeadline(time.Time{})
			}
			if err == nil {
				continue
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if !errors.Is(err, io.EOF) {
				return n, r, err
			}
			wait = sniffGrace // there will be no more
			break
		}
		if wait == sniffGrace {
			if n == 0 {
				r = silent
			}
			return n, r, c.SetReadDeadline(time.Time{})
		}
		// A read whose deadline has passed does not look whether bytes are there.
		wait = sniffGrace
	}
}

// remember tells mem who spoke first on a connection that began at start and on
// which sniff got no bytes.
func remember(mem *detect.Memory, key string, server bool, start, now time.Time) {
	switch {
	case !server:
		mem.ClientSpoke(key, now)
	case now.Sub(start) <= greetingTimeout:
		mem.ServerSpoke(key, now)
	}
}

// clusterFor is where a TLS connection goes for the name that its client asks for
// (table.Destination.ServerNames), drawn by weight; empty where nothing is
// configured for it.
func clusterFor(d *table.Destination, serverName string) string {
	for i := range d.ServerNames {
		s := &d.ServerNames[i]
		if !matchesName(s.Name, serverName) {
			continue
		}
		r := route.Route{Clusters: s.Clusters}
		cluster, _ := r.Pick(rand.Uint64())
		return cluster
	}
	return d.Cluster
}

// matchesName reports whether name is the pattern, or where that begins with "*.",
// has one or more labels in place of the star.
func matchesName(pattern, name string) bool {
	if suffix, ok := strings.CutPrefix(pattern, "*"); ok {
		return len(name) > len(suffix) && strings.HasSuffix(name, suffix)
	}
	return name != "" && pattern == name
}
