package proxy

import (
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/detect"
)

const (
	// sniffTimeout is how long a client is waited for before its connection is
	// carried as bytes. A server that speaks first is that much slower, once.
	sniffTimeout = 50 * time.Millisecond
	// greetingTimeout is how long after the beginning of a connection the first
	// bytes of a server count as its greeting. A server that gives up on a silent
	// client (HTTP's 408) takes longer.
	greetingTimeout = 5 * time.Second
)

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

// Detected is what was found out about ports of which nobody has said what they
// speak, and what to declare.
func (p *Proxy) Detected(now time.Time) []detect.Finding { return p.Seen.Snapshot(now, sniffTimeout) }
