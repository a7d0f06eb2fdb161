// Package table is the routing snapshot of the sidecar: what the control plane
// said, decoded and compiled, never changed once published, swapped as a whole
// behind one atomic pointer.
//
// xdsclient makes Tables; the proxy reads them. State that outlives a Table
// (breakers, connection pools, loads of endpoints) is kept by upstream under
// the cluster's name.
package table

import (
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/balance"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/breaker"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/outlier"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/retry"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/route"
)

// Table is one consistent configuration.
type Table struct {
	// Version names the configuration in logs: a hash over the versions of the
	// resources in it.
	Version string
	// Destinations by key, <namespace>/<service>:<port>, or <IP>:<port> of one that
	// was captured.
	Destinations map[string]*Destination
	// Clusters by name, which is a key too.
	Clusters map[string]*Cluster
	// Inbound is nil while the control plane has not said what the workload asks of
	// those who call it, or says that there is no such workload: nobody is served.
	Inbound *Inbound
}

// Destination is what is known of a port that the application calls.
type Destination struct {
	Key string
	// Service is <namespace>/<service>:<port>, whatever the key.
	Service string
	// Missing: the control plane answered that no such service exists.
	Missing bool
	// Protocol is http, tcp, tls (bytes, routed by server name) or auto, which is
	// found out for each connection: http where it begins as HTTP, else as tcp.
	Protocol string
	// Routes of an http or auto destination.
	Routes *route.Config
	// Cluster of a tcp or auto destination, and of a tls one for the server names
	// that ServerNames does not hold; empty there refuses them.
	Cluster string
	// ServerNames of a tls destination, in order of precedence.
	ServerNames []ServerName
}

// ServerName leads the TLS connections of a server name (RFC 6066, 3) to a
// cluster, undecrypted.
type ServerName struct {
	// Name in lower case; "*." at its beginning stands for one or more labels.
	Name string
	// Clusters with weights.
	Clusters []route.Weighted
}

// ByServerName is the cluster for a TLS connection that asks for the name, in
// lower case, empty where it asks for none; rnd draws among several. It is not ok
// where the name has no route, or none with a weight.
func (d *Destination) ByServerName(name string, rnd uint64) (cluster string, ok bool) {
	for i := range d.ServerNames {
		if s := &d.ServerNames[i]; s.matches(name) {
			r := route.Route{Clusters: s.Clusters}
			return r.Pick(rnd)
		}
	}
	return d.Cluster, d.Cluster != ""
}

func (s *ServerName) matches(name string) bool {
	if suffix, wild := strings.CutPrefix(s.Name, "*"); wild {
		return len(name) > len(suffix) && strings.HasSuffix(name, suffix)
	}
	return s.Name == name
}

// Cluster is a destination's endpoints and the policies that guard them.
type Cluster struct {
	Name      string
	Endpoints []balance.Endpoint
	// Breaker is nil where no policy sets trip.
	Breaker *breaker.Policy
	Limits  Limits
	// LimitsObserve: count what the limits would have rejected, reject nothing.
	LimitsObserve bool
	Outlier       *outlier.Policy
	Budget        retry.Budget
	// Policy is <namespace>/<name> of the CircuitBreaker; empty without one.
	Policy string
	// HTTP2: requests are sent over HTTP/2.
	HTTP2 bool
	// TLS is how the endpoints that say so (balance.Endpoint.TLS) are reached; nil
	// where none is.
	TLS *TLS
	// Source is the address that connections come from. The zero Addr leaves it to
	// the system.
	Source netip.Addr `json:"-"`
}

// TLS is mutual TLS towards the endpoints of a cluster.
type TLS struct {
	// Identities are the SPIFFE IDs of which the peer must prove one, sorted. None
	// would accept nobody.
	Identities []string
	// ServerName to ask for (RFC 6066, 3); not what is verified.
	ServerName string
}

// Limits of this proxy's use of a cluster; 0 is no limit.
type Limits struct {
	Connections     uint32
	PendingRequests uint32
	Requests        uint32
	Retries         uint32
}

// Current is the published Table. The zero value holds an empty one. It is
// safe for concurrent use.
type Current struct {
	p atomic.Pointer[Table]

	mu      sync.Mutex
	changed chan struct{} // nil while nobody has asked for it
}

// Load returns the Table in force; never nil.
func (c *Current) Load() *Table {
	if t := c.p.Load(); t != nil {
		return t
	}
	return &empty
}

// Store publishes t, which must not be changed afterwards.
func (c *Current) Store(t *Table) {
	c.p.Store(t)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.changed != nil {
		close(c.changed)
		c.changed = nil
	}
}

// Changed is closed when a Table is published after the call. Who waits for
// something calls it, then looks at what Load returns, then waits.
func (c *Current) Changed() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.changed == nil {
		c.changed = make(chan struct{})
	}
	return c.changed
}

var empty Table
