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
	// Instances by namespace, then name: what each proxy beside an application is
	// told of itself.
	Instances []Instance
}

// Instance is a pod that has a proxy: what the proxy must know to serve those
// who call the pod.
type Instance struct {
	Namespace      string
	Name           string // of the pod
	Workload       string
	ServiceAccount string
	// Addresses of the pod, one a family; none while it has none.
	Addresses []netip.Addr
	// MTLS is what the proxy asks of those who call it.
	MTLS MTLS
	// Ports of the pod that some Service leads to, by number. What comes in at
	// another is of Unknown protocol.
	Ports []InstancePort
	// Authorizations that apply to the pod, by policy.
	Authorizations []Authorization
}

// InstancePort is a port at which an application serves.
type InstancePort struct {
	Number   uint16
	Protocol Protocol
}

// MTLS is what a proxy asks of those who call.
type MTLS string

// The modes, as bootstrap writes them.
const (
	Off        MTLS = "off"        // clear text
	Permissive MTLS = "permissive" // mutual TLS from proxies, clear text from whoever has none
	Strict     MTLS = "strict"     // mutual TLS
)

// Action is what becomes of a request that a rule of an Authorization matches.
type Action string

// The actions. Deny is evaluated first. Where an Allow applies to a port, what
// none of its Allows matches is denied; where none applies it is allowed.
const (
	Allow Action = "Allow"
	Deny  Action = "Deny"
)

// Authorization is one AuthorizationPolicy where it applies to an Instance.
type Authorization struct {
	// Policy is <namespace>/<name>.
	Policy string
	Action Action
	// Observe: evaluate, count, explain; deny nothing.
	Observe bool
	// Ports of the pod that it applies to, sorted; none is all of them.
	Ports []uint16
	// Rules of which one must match. None matches nothing.
	Rules []AuthorizationRule
}

// AuthorizationRule matches when every list that is not empty has an item that
// matches. The zero value matches everything.
type AuthorizationRule struct {
	// Name is the rule's, or its index; where one rule of the policy became several,
	// a slash and a number follow. No two of an Authorization are equal.
	Name string
	// Principals are SPIFFE IDs; one that ends in "*" is a prefix. "*" is any
	// proven identity. Only mutual TLS proves one.
	Principals []string
	// NotPrincipals: none of these.
	NotPrincipals []string
	// Methods and Paths are those of a request. A Prefix is of the bytes here, not
	// of path elements: /api matches /apix. On a port whose bytes are no requests, a
	// rule that has any matches where its Action is Deny and does not where it is
	// Allow.
	Methods []string
	Paths   []PathMatch
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
	// Consumers are the Routes that callers of some namespaces have instead, by
	// namespace (GEP-1294, consumer routes).
	Consumers []Consumer
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

// Consumer is what callers of one namespace have instead of a Port's Routes.
type Consumer struct {
	Namespace string
	Routes    []Route
}

// Route sends the requests that its Match describes to its Backends.
type Route struct {
	// Name is <namespace>/<HTTPRoute or GRPCRoute>/<rule name or index>, or
	// "default". A rule with several matches makes several routes of one name.
	Name  string
	Match Match
	// Backends with weights. None, or a sum of zero: 500 (Gateway API), unless
	// Filters redirect.
	Backends []Backend
	// Filters of the rule; nil where it has none. Those of a backend are in Backend.
	Filters *Filters
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

// Filters change a request on its way, or answer it (Gateway API,
// HTTPRouteFilter).
type Filters struct {
	Request  HeaderChange
	Response HeaderChange
	// Redirect answers the request; nil does not.
	Redirect *Redirect
	// Rewrite is nil where nothing is rewritten.
	Rewrite *Rewrite
	// Mirrors get a copy of the request; their answers are thrown away.
	Mirrors []Mirror
}

// HeaderChange sets, adds and removes header fields. Names are lower case,
// sorted in each list; no name is in two.
type HeaderChange struct {
	Set    []Header
	Add    []Header
	Remove []string
}

// Header is one field.
type Header struct{ Name, Value string }

// Redirect answers with Location. What is empty stays as the request has it, but
// for the port where there is a Scheme: it is the scheme's own then. One that is
// the scheme's own is not written (Gateway API, HTTPRequestRedirectFilter.port).
type Redirect struct {
	Scheme string
	Host   string
	Port   uint16
	Path   *PathChange
	Status uint32 // 301, 302, 303, 307 or 308
}

// Rewrite changes what is sent to the backend.
type Rewrite struct {
	Host string
	Path *PathChange
}

// PathChange replaces the whole path, or the prefix that the route's Match
// matched; never both. Neither value is empty.
type PathChange struct {
	Full          *string
	ReplacePrefix *string
}

// Mirror is a backend that gets a copy of Numerator in Denominator requests.
type Mirror struct {
	Backend                Backend
	Numerator, Denominator uint32
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
	// Filters of this backend alone, after those of the rule; only header changes.
	Filters *Filters
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
