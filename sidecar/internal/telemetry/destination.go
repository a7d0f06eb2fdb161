package telemetry

import (
	"hash/maphash"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/accesslog"
)

// Protocol is what a request spoke.
type Protocol uint8

// The protocols that requests are told apart by.
const (
	HTTP1 Protocol = iota
	HTTP2
	GRPC // over HTTP/2
)

// String is the value of the label request_protocol, which, as Istio's, does
// not tell the versions of HTTP apart.
func (p Protocol) String() string {
	if p == GRPC {
		return "grpc"
	}
	return "http"
}

// Request is what the series of one destination differ in.
type Request struct {
	Protocol Protocol
	Status   int // 0 where there was no response
	// GRPCStatus is the status code in the trailers, 0 to 16, or -1 where none
	// came. It counts for GRPC only.
	GRPCStatus int8
	Flags      accesslog.Flags
	Secure     bool   // mutual TLS, on the side of the mesh
	Peer       string // <namespace>/<service account> of an inbound caller; empty: unknown
}

// key packs what is not text, so that finding a series compares one word.
func (r *Request) key() uint64 {
	grpc := uint64(0)
	if r.Protocol == GRPC {
		grpc = uint64(min(max(r.GRPCStatus, -1), 17) + 1)
	}
	k := uint64(r.Flags)<<32 | uint64(min(max(r.Status, 0), 1<<16-1))<<16 | grpc<<8 | uint64(r.Protocol&3)<<1
	if r.Secure {
		k |= 1
	}
	return k
}

// Destination is the series of one destination and direction. A listener
// resolves it once and keeps it: counting then looks nothing up by text, takes
// no lock and allocates nothing, but for the first request of its kind. It is
// safe for concurrent use.
type Destination struct {
	m        *Metrics
	outbound bool
	name     string // <namespace>/<service>:<port>

	// table is replaced when it grows; a series is put into it in place, under mu.
	table atomic.Pointer[seriesTable]
	mu    sync.Mutex
	known int

	attempts atomic.Pointer[[2]prometheus.Counter]
	tcp      atomic.Pointer[tcpSeries]
}

type requestSeries struct {
	key      uint64
	peer     string
	total    prometheus.Counter
	duration *durationSeries
}

// seriesTable is an open-addressed hash table that is at least half empty.
// Nothing is ever taken out of it.
type seriesTable struct {
	slots []atomic.Pointer[requestSeries]
}

type tcpSeries struct{ opened, closed, sent, received prometheus.Counter }

// peerSeed keeps callers from choosing names that collide.
var peerSeed = maphash.MakeSeed()

func hash(key uint64, peer string) uint64 {
	h := key * 0x9e3779b97f4a7c15
	if peer != "" {
		h ^= maphash.String(peerSeed, peer)
	}
	return h ^ h>>32
}

func (t *seriesTable) find(key uint64, peer string) *requestSeries {
	mask := uint64(len(t.slots) - 1)
	for i := hash(key, peer); ; i++ {
		s := t.slots[i&mask].Load()
		if s == nil || s.key == key && s.peer == peer {
			return s
		}
	}
}

func (t *seriesTable) put(s *requestSeries) {
	mask := uint64(len(t.slots) - 1)
	for i := hash(s.key, s.peer); ; i++ {
		if slot := &t.slots[i&mask]; slot.Load() == nil {
			slot.Store(s)
			return
		}
	}
}

// Destination returns the series of requests to the destination
// <namespace>/<service>:<port>. It takes a lock: resolve once, keep.
func (m *Metrics) Destination(outbound bool, key string) *Destination {
	m.mu.Lock()
	defer m.mu.Unlock()
	k := destinationKey{outbound, key}
	if d := m.destinations[k]; d != nil {
		return d
	}
	if len(m.destinations) >= maxSeries {
		return m.beyond[index(outbound)]
	}
	d := newDestination(m, outbound, key)
	m.destinations[k] = d
	return d
}

type destinationKey struct {
	outbound bool
	name     string
}

func newDestination(m *Metrics, outbound bool, name string) *Destination {
	d := &Destination{m: m, outbound: outbound, name: name}
	d.table.Store(&seriesTable{slots: make([]atomic.Pointer[requestSeries], 8)})
	return d
}

func index(b bool) int {
	if b {
		return 1
	}
	return 0
}

// Observe counts a request that took the time given.
func (d *Destination) Observe(r Request, took time.Duration) {
	key := r.key()
	s := d.table.Load().find(key, r.Peer)
	if s == nil {
		s = d.add(key, &r)
	}
	s.total.Inc()
	s.duration.observe(took)
}

// add makes the series of a request that is the first of its kind. Beyond
// maxSeries it is the overflow's, which costs no lock either.
func (d *Destination) add(key uint64, r *Request) *requestSeries {
	if s := d.m.overflow.Load(); s != nil {
		return s
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	t := d.table.Load()
	if s := t.find(key, r.Peer); s != nil {
		return s
	}
	s, room := d.m.request(d, key, r)
	if !room {
		return s
	}
	if d.known++; d.known > len(t.slots)/2 {
		next := &seriesTable{slots: make([]atomic.Pointer[requestSeries], 2*len(t.slots))}
		for i := range t.slots {
			if old := t.slots[i].Load(); old != nil {
				next.put(old)
			}
		}
		next.put(s)
		d.table.Store(next)
		return s
	}
	t.put(s)
	return s
}

// request registers a series. Where there is no room for one more it returns the
// overflow's.
func (m *Metrics) request(d *Destination, key uint64, r *Request) (s *requestSeries, room bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.known >= maxSeries {
		if m.overflow.Load() == nil {
			labels := slices.Repeat([]string{"overflow"}, len(requestLabels)+4)
			m.overflow.Store(&requestSeries{total: m.requests.WithLabelValues(labels...), duration: m.duration.with(labels[:len(requestLabels)+1]...)})
		}
		return m.overflow.Load(), false
	}
	m.known++
	peer := strings.Clone(r.Peer) // the caller's may be part of something large
	labels := append([]string{}, d.reporter(peer)...)
	namespace, service := Service(d.name)
	labels = append(labels, service+"."+namespace+".svc", service, namespace, r.Protocol.String())
	status := strconv.Itoa(r.Status)
	grpc := ""
	if r.Protocol == GRPC && r.GRPCStatus >= 0 {
		grpc = strconv.Itoa(int(r.GRPCStatus))
	}
	security := "none"
	if r.Secure {
		security = "mutual_tls"
	}
	n := len(labels)
	return &requestSeries{
		key: key, peer: peer,
		total:    m.requests.WithLabelValues(append(labels[:n:n], status, r.Flags.String(), grpc, security)...),
		duration: m.duration.with(append(labels[:n:n], status)...),
	}, true
}

// reporter is who counts, and the caller as far as it is known.
func (d *Destination) reporter(peer string) []string {
	if d.outbound {
		return []string{"source", d.m.node.Workload, d.m.node.Namespace}
	}
	if namespace, account, ok := strings.Cut(peer, "/"); ok {
		return []string{"destination", account, namespace}
	}
	return []string{"destination", "unknown", "unknown"}
}

// Attempt counts an attempt at an endpoint; retry tells the second and later
// ones of a request.
func (d *Destination) Attempt(retry bool) {
	c := d.attempts.Load()
	if c == nil {
		label := serviceLabel(d.name)
		c = &[2]prometheus.Counter{d.m.attempts.WithLabelValues(label, "original"), d.m.attempts.WithLabelValues(label, "retry")}
		d.attempts.Store(c) // who comes second stores the same counters
	}
	c[index(retry)].Inc()
}

// TCPOpened counts a relayed connection.
func (d *Destination) TCPOpened() { d.tcpSeries().opened.Inc() }

// TCPClosed counts its end and the bytes that it carried: from the caller and
// to it.
func (d *Destination) TCPClosed(received, sent int64) {
	s := d.tcpSeries()
	s.closed.Inc()
	s.received.Add(float64(received))
	s.sent.Add(float64(sent))
}

func (d *Destination) tcpSeries() *tcpSeries {
	s := d.tcp.Load()
	if s == nil {
		l := append(d.reporter("")[:2:2], serviceLabel(d.name))
		m := d.m
		s = &tcpSeries{
			opened: m.tcpOpened.WithLabelValues(l...), closed: m.tcpClosed.WithLabelValues(l...),
			sent: m.tcpSent.WithLabelValues(l...), received: m.tcpReceived.WithLabelValues(l...),
		}
		d.tcp.Store(s)
	}
	return s
}
