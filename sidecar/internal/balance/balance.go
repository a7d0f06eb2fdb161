// Package balance chooses the endpoint of a request: the one with fewer
// requests in flight of two drawn at random, scaled by the latency that each
// has shown.
//
// It is pure: loads are read through the endpoints it is given and randomness
// is an argument.
package balance

import "net/netip"

// Endpoint is one address of a cluster, as configuration gave it.
type Endpoint struct {
	Address  netip.AddrPort
	Instance string // pod name
	Workload string
	Zone     string
	Healthy  bool
	Weight   uint32
	// TLS: the endpoint takes mutual TLS, and is not spoken to without.
	TLS bool
}
