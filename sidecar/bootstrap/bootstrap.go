// Package bootstrap is what a proxy must be told at birth: who it is, where
// its control plane is, and which ports it opens.
//
// It is a contract. The injector writes it into pods, the demo into command
// lines, the sidecar reads it, and the control plane reads Metadata from the
// xDS node that the proxy presents. It knows syntax and limits only and imports
// no other package of ours.
package bootstrap

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// The ports users of Istio know (all may be changed by flags).
const (
	PortAdmin    = 15000 // loopback: config dump, breakers, drain
	PortOutbound = 15001 // captured outbound traffic
	PortInbound  = 15006 // captured inbound traffic
	PortXDS      = 15010 // control plane on loopback, in clear
	PortXDSTLS   = 15012 // control plane with TLS
	PortMetrics  = 15020 // Prometheus
	PortHealth   = 15021 // readiness
)

// MaxListeners is how many upstreams and inbounds together one proxy takes.
const MaxListeners = 256

// Upstream is an ambassador port: calls to Listen go to Service at Port.
// Written payments.shop:80=127.0.0.1:4001.
type Upstream struct {
	Service   string
	Namespace string
	Port      uint16
	Listen    netip.AddrPort
}

// Key is the name of the destination on the wire: <namespace>/<service>:<port>.
func (u Upstream) Key() string {
	return u.Namespace + "/" + u.Service + ":" + strconv.Itoa(int(u.Port))
}

// String writes the form that ParseUpstream reads.
func (u Upstream) String() string {
	return u.Service + "." + u.Namespace + ":" + strconv.Itoa(int(u.Port)) + "=" + u.Listen.String()
}

// ParseUpstream reads <service>.<namespace>:<port>=<ip>:<port>.
func ParseUpstream(s string) (Upstream, error) {
	fail := func(why string) (Upstream, error) {
		return Upstream{}, fmt.Errorf("upstream %q: %s; write <service>.<namespace>:<port>=<ip>:<port>, for example payments.shop:80=127.0.0.1:4001", s, why)
	}
	dest, listen, ok := strings.Cut(s, "=")
	if !ok {
		return fail("there is no '='")
	}
	host, port, ok := strings.Cut(dest, ":")
	if !ok {
		return fail("the service has no port")
	}
	name, ns, ok := strings.Cut(host, ".")
	if !ok || !dnsLabel(name) || !dnsLabel(ns) {
		return fail("the part before ':' is not <service>.<namespace>")
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return fail("port " + strconv.Quote(port) + " is not 1 to 65535")
	}
	addr, err := netip.ParseAddrPort(listen)
	if err != nil {
		return fail("the address to listen on is not <ip>:<port>")
	}
	return Upstream{Service: name, Namespace: ns, Port: uint16(n), Listen: addr}, nil
}

// Inbound is a port at which other workloads reach this one: connections to
// Listen are carried to the application at Forward. Written
// http:127.0.0.1:5001=127.0.0.1:8080, the protocol being http, tcp, tls (the
// application's own, carried as bytes), auto (what each connection begins as) or,
// where it is left out, http.
type Inbound struct {
	Protocol string
	Listen   netip.AddrPort
	Forward  netip.AddrPort
}

// String writes the form that ParseInbound reads.
func (in Inbound) String() string {
	return in.Protocol + ":" + in.Listen.String() + "=" + in.Forward.String()
}

// ParseInbound reads [http:|tcp:|tls:|auto:]<ip>:<port>=<ip>:<port>.
func ParseInbound(s string) (Inbound, error) {
	in := Inbound{Protocol: "http"}
	rest := s
	for _, p := range []string{"http", "tcp", "tls", "auto"} {
		if after, ok := strings.CutPrefix(s, p+":"); ok {
			in.Protocol, rest = p, after
		}
	}
	fail := func(why string) (Inbound, error) {
		return Inbound{}, fmt.Errorf("inbound %q: %s; write [http:|tcp:|tls:|auto:]<ip>:<port>=<ip>:<port>, for example http:127.0.0.1:5001=127.0.0.1:8080", s, why)
	}
	listen, forward, ok := strings.Cut(rest, "=")
	if !ok {
		return fail("there is no '='")
	}
	var err error
	if in.Listen, err = netip.ParseAddrPort(listen); err != nil {
		return fail("the address to listen on is not <ip>:<port>")
	}
	if in.Forward, err = netip.ParseAddrPort(forward); err != nil || in.Forward.Port() == 0 {
		return fail("the address of the application is not <ip>:<port>")
	}
	if in.Listen == in.Forward {
		return fail("it forwards to itself")
	}
	return in, nil
}

// Config is what a proxy must be told at birth.
type Config struct {
	Namespace      string // of the workload
	Workload       string // Deployment, StatefulSet, ...
	Instance       string // pod name; unique in its namespace
	ServiceAccount string
	TrustDomain    string
	ControlPlane   string // host:port of the xDS server
	Upstreams      []Upstream
	Inbounds       []Inbound
	// MTLS is what is asked of those who call: MTLSOff, MTLSPermissive or
	// MTLSStrict. Empty is off.
	MTLS string
	// SDS is where a sidecar serves the workload's certificate for an Envoy:
	// unix:///<path> or host:port on loopback. Empty: the Envoy has none.
	SDS string
	// ControlPlaneTLS: ControlPlane is reached over TLS, which needs SDS for an
	// Envoy.
	ControlPlaneTLS bool
	// Capture: the pod's traffic is redirected to PortOutbound and PortInbound, as
	// netinit does. What the proxy asks of those who call it is then said by the
	// control plane (the listener named by InboundName), not by MTLS.
	Capture bool
	// Addresses of the pod; a proxy that captures serves what was sent to these.
	Addresses []netip.Addr
}

// InboundName is the listener that says what a proxy that captures asks of those
// who call it: inbound/<namespace>/<instance>. Until the control plane has
// answered, and while it says that there is none, nobody is served.
func (c Config) InboundName() string { return "inbound/" + c.Namespace + "/" + c.Instance }

// What is asked of those who call a workload.
const (
	MTLSOff        = "off"        // nothing: everything is passed to the application as it is
	MTLSPermissive = "permissive" // mutual TLS from other workloads, and clear text from whoever has none
	MTLSStrict     = "strict"     // mutual TLS
)

// Names that the certificates of an Envoy go by: those of the two secrets, as
// Istio's are called, and of the static cluster that serves them.
const (
	SecretCertificate = "default"
	SecretRoots       = "ROOTCA"
	ClusterSDS        = "sds"
)

// ProtocolMesh in the ALPN of a ClientHello (RFC 7301) says that the client is
// the proxy of another workload and not the application itself.
const ProtocolMesh = "outrigger"

// NodeID is the xDS node id: <instance>.<namespace>.
func (c Config) NodeID() string { return c.Instance + "." + c.Namespace }

// Metadata is what the proxy says of itself in the xDS node, as string values
// and lists of strings under the keys below: ambassador listeners of a proxy that cannot
// open them by itself (Envoy) are built from it.
func (c Config) Metadata() map[string]any {
	ups := make([]any, 0, len(c.Upstreams))
	for _, u := range c.Upstreams {
		ups = append(ups, u.String())
	}
	ins := make([]any, 0, len(c.Inbounds))
	for _, in := range c.Inbounds {
		ins = append(ins, in.String())
	}
	m := map[string]any{
		MetaNamespace: c.Namespace, MetaWorkload: c.Workload, MetaInstance: c.Instance,
		MetaServiceAccount: c.ServiceAccount, MetaUpstreams: ups, MetaInbounds: ins,
	}
	if c.MTLS != "" {
		m[MetaMTLS] = c.MTLS
	}
	if c.SDS != "" {
		m[MetaSDS] = "true"
	}
	if c.Capture {
		m[MetaCapture] = "true"
		ips := make([]any, 0, len(c.Addresses))
		for _, a := range c.Addresses {
			ips = append(ips, a.String())
		}
		m[MetaAddresses] = ips
	}
	return m
}

// Keys of the xDS node metadata.
const (
	MetaNamespace      = "NAMESPACE"
	MetaWorkload       = "WORKLOAD"
	MetaInstance       = "INSTANCE"
	MetaServiceAccount = "SERVICE_ACCOUNT"
	MetaUpstreams      = "UPSTREAMS"
	MetaInbounds       = "INBOUNDS"
	MetaMTLS           = "MTLS"      // see Config.MTLS
	MetaSDS            = "SDS"       // "true": the proxy has the cluster ClusterSDS
	MetaCapture        = "CAPTURE"   // "true": see Config.Capture
	MetaAddresses      = "ADDRESSES" // see Config.Addresses
)

// UserAgent is the xDS user_agent_name of our sidecar; Envoy says "envoy" and
// gRPC "gRPC <language>".
const UserAgent = "outrigger"

// Validate says what is missing or contradictory, naming the field.
func (c Config) Validate() error {
	for _, f := range []struct{ flag, value string }{
		{"namespace", c.Namespace}, {"workload", c.Workload}, {"instance", c.Instance}, {"service-account", c.ServiceAccount},
	} {
		if !dnsName(f.value) {
			return fmt.Errorf("--%s %q is not a Kubernetes name: lower case letters, digits, '-' and '.'", f.flag, f.value)
		}
	}
	if c.ControlPlane == "" {
		return errors.New("--control-plane is empty: give the address of the control plane, for example 127.0.0.1:15010")
	}
	switch c.MTLS {
	case "", MTLSOff, MTLSPermissive, MTLSStrict:
	default:
		return fmt.Errorf("--mtls %q: write off, permissive or strict", c.MTLS)
	}
	if n := len(c.Upstreams) + len(c.Inbounds); n > MaxListeners {
		return fmt.Errorf("%d --upstream and --inbound listeners: at most %d; fewer destinations, or transparent capture", n, MaxListeners)
	}
	seen := map[netip.AddrPort]string{}
	check := func(addr netip.AddrPort, who string) error {
		if addr.Port() == 0 {
			return nil // the kernel chooses
		}
		if other, dup := seen[addr]; dup {
			return fmt.Errorf("%s and %s both listen on %s: give each its own port", other, who, addr)
		}
		seen[addr] = who
		return nil
	}
	for _, u := range c.Upstreams {
		if err := check(u.Listen, "--upstream "+u.String()); err != nil {
			return err
		}
	}
	for _, in := range c.Inbounds {
		if err := check(in.Listen, "--inbound "+in.String()); err != nil {
			return err
		}
	}
	return nil
}

func dnsLabel(s string) bool { return dnsName(s) && !strings.Contains(s, ".") }

func dnsName(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	for i, c := range []byte(s) {
		switch {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9':
		case (c == '-' || c == '.') && i > 0 && i < len(s)-1:
		default:
			return false
		}
	}
	return true
}
