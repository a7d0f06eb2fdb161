package table

import "github.com/outrigger-mesh/outrigger/sidecar/internal/authz"

// Inbound is what the workload asks of those who call it, as the control plane
// says: for a proxy that captures its pod's traffic.
type Inbound struct {
	// MTLS is off, permissive or strict, as in bootstrap.Config.
	MTLS string
	// Ports of the application by number.
	Ports map[uint16]InboundPort
	// Default is for ports that are not in Ports.
	Default InboundPort
}

// InboundPort is how the connections to one port of the application are taken.
type InboundPort struct {
	// Protocol is http, tcp or auto, as in Destination.
	Protocol string
	// HTTPAuthorization is asked for every request of an http or auto port, and
	// BytesAuthorization for every connection that is carried as bytes. Nil lets
	// everybody in.
	HTTPAuthorization  *authz.Policy
	BytesAuthorization *authz.Policy
}

// Port is how connections to a port of the application are taken.
func (in *Inbound) Port(n uint16) InboundPort {
	if p, ok := in.Ports[n]; ok {
		return p
	}
	return in.Default
}
