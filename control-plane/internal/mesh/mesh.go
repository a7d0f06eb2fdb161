// Package mesh is the model in the middle of the control plane: services,
// ports, routes, endpoints and policies, with every default filled in and
// every reference resolved.
//
// translate makes it from Kubernetes objects; xds turns it into protobufs. It
// knows neither: it imports the standard library only. A Mesh is built whole,
// then never changed, so any number of goroutines may read it.
package mesh

import (
	"net/netip"
	"strconv"
	"time"
)

// Mesh is everything the proxies may be told. Slices are sorted so that the
// same objects in any order give the same Mesh.
type Mesh struct {
	TrustDomain string
	// Services by namespace, then name.
	Services []Service
}

// Service is a name that callers use.
type Service struct {
	Namespace string
	Name      string
	// VIPs are the cluster IPs; none for a headless Service or on a laptop.
	VIPs []netip.Addr
	// Ports by number.
	Ports []Port
}

// Protocol is what a port speaks.
type Protocol string

// The protocols of a port. Unknown is found out for each connection: HTTP where
// it begins so, else TCP. TLS is the application's own and stays closed: it is led
// by the server name that the client asks for.
const (
	HTTP1   Protocol = "http"
	HTTP2   Protocol = "http2"
	GRPC    Protocol = "grpc"
	TCP     Protocol = "tcp"
	TLS     Protocol = "tls"
	Unknown Protocol = "unknown"
)

// IsHTTP reports whether requests on the port are routed one by one.
func (p Protocol) IsHTTP() bool { return p == HTTP1 || p == HTTP2 || p == GRPC }

// MayBeHTTP reports whether there may be requests on the port, which are then
// routed one by one.
func (p Protocol) MayBeHTTP() bool { return p.IsHTTP() || p == Unknown }

// Port is one port of a Service: the unit that is routed to, balanced over and
// protected by policies. Its name on the wire is Key.
type Port struct {
	Name     string
	Number   uint16
	Protocol Protocol
	// Endpoints by address. Empty means that every call is answered 503 UH.
	Endpoints []Endpoint
	// Identities are the SPIFFE IDs of the endpoints that take mutual TLS, sorted;
	// none where none does.
	Identities []string
	// Routes in order of precedence (Gateway API, HTTPRouteRule.matches). Where
	// no HTTPRoute is attached to a port that may be HTTP there is one, the implicit
	// route named "default" to the port itself. Where some are attached there is no
	// default: a request that none matches is answered 404, and so is every
	// request when no attached rule has a valid match. Other ports have none.
	Routes []Route
	// ServerNames of a TLS port in order of precedence: exact names, then wildcards,
	// the longest first. No two are equal.
	ServerNames []ServerName
	// OnlyServerNames: some TLSRoute is attached, so that a connection whose server
	// name is not among ServerNames is refused. It goes to the port itself
	// otherwise.
	OnlyServerNames bool
	// Breaker is nil where no CircuitBreaker names the port.
	Breaker *CircuitBreaker
	// Budget bounds retries to this port.
	Budget RetryBudget
}

// Key names a port on the wire: <namespace>/<service>:<port>. Routes and
// clusters carry it as their xDS name.
func Key(namespace, service string, port uint16) string {
	return namespace + "/" + service + ":" + strconv.Itoa(int(port))
}

// Endpoint is one address at which a port is served.
type Endpoint struct {
	Address netip.AddrPort
	// Instance is the pod (or Workload endpoint) behind the address.
	Instance string
	// Workload that the instance belongs to.
	Workload       string
	ServiceAccount string
	// MTLS: the endpoint takes mutual TLS from the proxies of other workloads.
	MTLS bool
	Zone string
	// Ready is false for endpoints that should get no new requests.
	Ready bool
}

// Route sends the requests that its Match describes to its Backends.
type Route struct {
	// Name is <namespace>/<HTTPRoute>/<rule name or index>, or "default".
	Name  string
	Match Match
	// Backends with weights. None, or a sum of zero: 500 (Gateway API).
	Backends []Backend
	// Timeout of the request with all its attempts; 0 is none.
	Timeout time.Duration
	Retry   Retry
}

// Match describes requests; the zero value matches all.
type Match struct {
	Path    PathMatch
	Method  string
	Headers []HeaderMatch
	Query   []QueryMatch
}

// ServerName sends the TLS connections for a name (RFC 6066, 3) to Backends,
// undecrypted.
type ServerName struct {
	// Name in lower case; "*." at its beginning stands for one or more labels.
	Name string
	// Route is <namespace>/<TLSRoute>.
	Route string
	// Backends with weights. None, or a sum of zero: connections are refused, and so
	// is the share of a backend that is Missing.
	Backends []Backend
}

// MatchKind is how a value is compared.
type MatchKind string

// The kinds of match. Prefix matches whole path elements, as the Gateway API
// wants: /api matches /api and /api/x but not /apix. Regex is RE2, anchored.
const (
	Any    MatchKind = ""
	Exact  MatchKind = "Exact"
	Prefix MatchKind = "Prefix"
	Regex  MatchKind = "Regex"
)

// PathMatch compares the path without the query.
type PathMatch struct {
	Kind  MatchKind
	Value string
}

// HeaderMatch compares one header; Name is lower case. Kind is Exact or Regex.
type HeaderMatch struct {
	Name  string
	Kind  MatchKind
	Value string
}

// QueryMatch compares one query parameter. Kind is Exact or Regex.
type QueryMatch struct {
	Name  string
	Kind  MatchKind
	Value string
}

// Backend is a port that receives a share of a route's requests.
type Backend struct {
	Namespace string
	Service   string
	Port      uint16
	Weight    uint32
	// Missing says that the reference does not resolve: no such Service or port,
	// not permitted, or with a filter that is not supported. The backend keeps
	// its weight and that share of the requests is answered 500 (Gateway API,
	// HTTPRouteRule.backendRefs). Its Port is 0, so that its key names no port of
	// the mesh; Service is what the user wrote, for messages.
	Missing bool
}

// Retry says which attempts are made again. Attempts is the number after the
// first try; 0 switches retries off.
type Retry struct {
	// Policy is <namespace>/<name> of the RetryPolicy, the Route's Name where the
	// HTTPRoute's own retry field is in force, or "default".
	Policy string
	// On in Envoy's retry_on words, sorted.
	On []string
	// IdempotentOn are further words that apply to idempotent methods only
	// (RFC 9110, 9.2.2). Envoy has no word for it.
	IdempotentOn []string
	// Status codes that are retried, sorted.
	Status        []uint32
	Attempts      uint32
	PerTryTimeout time.Duration
	BackoffBase   time.Duration
	BackoffMax    time.Duration
}

// RetryBudget bounds the retries in flight to the larger of a share of the
// requests in flight and a minimum.
type RetryBudget struct {
	Percent        uint32
	MinConcurrency uint32
}

// CircuitBreaker is a CircuitBreaker with its defaults filled in.
type CircuitBreaker struct {
	// Policy is <namespace>/<name> of the object.
	Policy string
	// Observe: evaluate, count, explain; reject and eject nothing.
	Observe  bool
	Trip     *Trip
	Limits   Limits
	Ejection *Ejection
}

// Trip is the breaker that each caller keeps for a port. A condition that is
// zero is not used.
type Trip struct {
	ConsecutiveFailures uint32
	FailureRatio        float64
	SlowCallThreshold   time.Duration
	SlowCallRatio       float64
	MinimumRequests     uint32
	Window              time.Duration
	OpenFor             time.Duration
	HalfOpenRequests    uint32
	// FailureOn in Envoy's words and gRPC status names, sorted.
	FailureOn []string
}

// Limits of one caller; nil is no limit.
type Limits struct {
	Connections     *uint32
	PendingRequests *uint32
	Requests        *uint32
	Retries         *uint32
}

// Ejection is outlier detection. A counter that is zero is not used.
type Ejection struct {
	Consecutive5xx           uint32
	ConsecutiveGatewayErrors uint32
	Interval                 time.Duration
	BaseEjectionTime         time.Duration
	MaxEjectionPercent       uint32
	FailurePercentage        *FailurePercentage
}

// FailurePercentage ejects endpoints whose share of failures in an interval
// reaches Threshold percent.
type FailurePercentage struct {
	Threshold     uint32
	MinimumHosts  uint32
	RequestVolume uint32
}
