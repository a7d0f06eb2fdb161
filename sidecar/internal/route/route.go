// Package route decides which route of a destination a request takes, and
// which of its clusters.
//
// It is pure: it knows requests as values and randomness as an argument, never
// a connection or a clock. The routing table is compiled once, when
// configuration arrives, so that Match allocates nothing.
package route

import (
	"regexp"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/retry"
)

// Config is the routes of one destination, <namespace>/<service>:<port>, in
// order of precedence: the first match wins. It is never changed once made.
type Config struct {
	Name   string
	Routes []Route
}

// Route is one way that requests take.
type Route struct {
	// Name for logs and metrics.
	Name  string
	Match Match
	// Clusters with weights. Empty, or a total weight of zero: the request is
	// answered 500 (Gateway API, HTTPRouteRule.backendRefs).
	Clusters []Weighted
	// Redirect answers the request; nil does not.
	Redirect *Redirect
	// Path and Host are what the cluster is asked for instead; nil and empty are
	// what the client asks for.
	Path *PathRewrite
	Host []byte
	// Mirrors get a copy of the request.
	Mirrors []Mirror
	// Timeout of the request with all its attempts; 0 is none.
	Timeout time.Duration
	Retry   retry.Policy
}

// Weighted is a cluster and its share.
type Weighted struct {
	Cluster string
	Weight  uint32
	// Request and Response are the changes of the route and of this cluster; nil
	// where there are none.
	Request, Response *Change
}

// Mirror is a cluster that gets a copy of Numerator in Denominator requests.
type Mirror struct {
	Cluster                string
	Numerator, Denominator uint32
}

// Match describes requests; the zero value matches every one.
type Match struct {
	// At most one of Path, Prefix and PathRegex is set. Prefix matches whole
	// path elements: /api matches /api and /api/x, not /apix.
	Path      string
	Prefix    string
	PathRegex *regexp.Regexp
	Method    string
	Headers   []Value
	Query     []Value
}

// Value matches one header (Name in lower case) or query parameter, exactly or,
// where Regex is set, as a whole by the expression.
type Value struct {
	Name  string
	Exact string
	Regex *regexp.Regexp
}
