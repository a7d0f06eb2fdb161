package detect

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	// maxKeys bounds a Memory. Beyond it the destination that was found longest ago
	// is forgotten.
	maxKeys = 1024
	// remember is how long what was found is believed without being found again.
	remember = 10 * time.Minute
)

// Memory holds what was found last on each destination of unknown protocol, so
// that one on which the server speaks first is waited for once only. The zero
// value is ready. It is safe for concurrent use; time is an argument.
type Memory struct {
	mu   sync.Mutex
	keys map[string]*finding
}

type finding struct {
	protocol    Protocol
	serverFirst bool
	since, last time.Time
	count       uint64
}

// Finding is what a Memory knows of a destination.
type Finding struct {
	// Destination is <namespace>/<service>:<port>.
	Destination string `json:"destination"`
	// Protocol is the word of the Protocol that was found last.
	Protocol string `json:"protocol"`
	// ServerFirst: the server speaks first, so connections are not waited for.
	ServerFirst bool `json:"server_first"`
	// Since when it is the same each time, Last when it was found last, and Count
	// how often.
	Since time.Time `json:"since"`
	Last  time.Time `json:"last"`
	Count uint64    `json:"count"`
	// Hint says what to declare, and why.
	Hint string `json:"hint"`
}

// Found takes in what Detect said of a connection on which the client spoke
// first.
func (m *Memory) Found(key string, p Protocol, now time.Time) {
	if p == More {
		return
	}
	m.set(key, p, false, now)
}

// ServerSpoke takes in that on a connection whose client said nothing while it
// was waited for, the first bytes came from the server. It is ignored where
// another protocol than bytes was found lately: an HTTP server may answer a
// request that does not come (408), and one pooled connection must not turn the
// others into bytes.
func (m *Memory) ServerSpoke(key string, now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if f := m.current(key, now); f != nil && f.protocol != Opaque {
		return
	}
	m.setLocked(key, Opaque, true, now)
}

// ClientSpoke takes in that the client's bytes came first on a connection that
// was not waited for, or in vain. It forgets that the server speaks first.
func (m *Memory) ClientSpoke(key string, now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if f := m.current(key, now); f != nil && f.serverFirst {
		delete(m.keys, key)
	}
}

// ServerFirst reports whether the server is known to speak first, so that
// waiting for the client would only cost time.
func (m *Memory) ServerFirst(key string, now time.Time) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := m.current(key, now)
	return f != nil && f.serverFirst
}

// Snapshot is what is known at now, by destination. wait is how long detection
// waits for a client, for the hints.
func (m *Memory) Snapshot(now time.Time, wait time.Duration) []Finding {
	m.mu.Lock()
	out := make([]Finding, 0, len(m.keys))
	for key := range m.keys {
		f := m.current(key, now)
		if f == nil {
			continue
		}
		out = append(out, Finding{
			Destination: key, Protocol: f.protocol.String(), ServerFirst: f.serverFirst,
			Since: f.since, Last: f.last, Count: f.count,
		})
	}
	m.mu.Unlock()
	for i := range out {
		out[i].Hint = out[i].hint(wait)
	}
	slices.SortFunc(out, func(a, b Finding) int { return cmp.Compare(a.Destination, b.Destination) })
	return out
}

func (f *Finding) hint(wait time.Duration) string {
	port := "the port of " + f.Destination
	if i := strings.LastIndexByte(f.Destination, ':'); i >= 0 {
		port = "port " + f.Destination[i+1:] + " of Service " + f.Destination[:i]
	}
	switch {
	case f.ServerFirst:
		return fmt.Sprintf("set appProtocol: tcp on %s: the server speaks first, and detection costs each first connection %v", port, wait)
	case f.Protocol == HTTP1.String():
		return fmt.Sprintf("set appProtocol: http on %s: a connection that is opened ahead of its first request by more than %v is carried as bytes", port, wait)
	case f.Protocol == HTTP2.String():
		return fmt.Sprintf("set appProtocol: http2 (or grpc) on %s: a connection that is opened ahead of its first request by more than %v is carried as bytes", port, wait)
	case f.Protocol == TLS.String():
		return fmt.Sprintf("set appProtocol: tls on %s: then TLSRoutes may lead it by server name", port)
	}
	return fmt.Sprintf("set appProtocol: tcp on %s: what it speaks is not HTTP", port)
}

// current is what is believed of key, or nil. mu must be held.
func (m *Memory) current(key string, now time.Time) *finding {
	f := m.keys[key]
	if f == nil || now.Sub(f.last) >= remember {
		return nil
	}
	return f
}

func (m *Memory) set(key string, p Protocol, serverFirst bool, now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.setLocked(key, p, serverFirst, now)
}

func (m *Memory) setLocked(key string, p Protocol, serverFirst bool, now time.Time) {
	f := m.current(key, now)
	if f != nil && f.protocol == p && f.serverFirst == serverFirst {
		f.last = now
		f.count++
		return
	}
	if m.keys == nil {
		m.keys = map[string]*finding{}
	}
	if m.keys[key] == nil && len(m.keys) >= maxKeys {
		m.forgetOldest()
	}
	m.keys[key] = &finding{protocol: p, serverFirst: serverFirst, since: now, last: now, count: 1}
}

func (m *Memory) forgetOldest() {
	oldest := ""
	for key, f := range m.keys {
		if oldest == "" || f.last.Before(m.keys[oldest].last) {
			oldest = key
		}
	}
	delete(m.keys, oldest)
}
