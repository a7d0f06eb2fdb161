package xds

import (
	"regexp"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
)

// headerEdits are changes to header fields as Envoy writes them: what is removed
// goes first, then what is set, then what is added.
type headerEdits struct {
	add    []*corev3.HeaderValueOption
	remove []string
}

// headers makes one list of changes of which a later one sees what an earlier one
// did. Envoy would apply the changes of a weighted cluster before those of its
// route, and the Gateway API wants them after.
func headers(changes ...mesh.HeaderChange) headerEdits {
	type field struct {
		removed bool
		options []*corev3.HeaderValueOption
	}
	fields := map[string]*field{}
	var names []string
	of := func(name string) *field {
		f := fields[name]
		if f == nil {
			f = &field{}
			fields[name], names = f, append(names, name)
		}
		return f
	}
	for _, c := range changes {
		for _, h := range c.Set {
			*of(h.Name) = field{options: []*corev3.HeaderValueOption{headerOption(h, corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD)}}
		}
		for _, h := range c.Add {
			f, action := of(h.Name), corev3.HeaderValueOption_APPEND_IF_EXISTS_OR_ADD
			if f.removed {
				f.removed, action = false, corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD
			}
			f.options = append(f.options, headerOption(h, action))
		}
		for _, name := range c.Remove {
			*of(name) = field{removed: true}
		}
	}
	var out headerEdits
	for _, name := range names {
		if name == "host" || strings.HasPrefix(name, ":") {
			continue // Envoy would refuse the whole message: a rewrite is what changes them
		}
		f := fields[name]
		if f.removed {
			out.remove = append(out.remove, name)
		}
		out.add = append(out.add, f.options...)
	}
	return out
}

// headerOption writes a value so that Envoy sees no command in it.
func headerOption(h mesh.Header, action corev3.HeaderValueOption_HeaderAppendAction) *corev3.HeaderValueOption {
	return &corev3.HeaderValueOption{
		Header: &corev3.HeaderValue{Key: h.Name, Value: literal(h.Value)}, AppendAction: action, KeepEmptyValue: h.Value == "",
	}
}

// changesOf are the filters of a rule, or of a backend, that change headers; f may
// be nil.
func changesOf(f *mesh.Filters) (request, response mesh.HeaderChange) {
	if f == nil {
		return mesh.HeaderChange{}, mesh.HeaderChange{}
	}
	return f.Request, f.Response
}

func (c headerEdits) empty() bool { return len(c.add)+len(c.remove) == 0 }

// changeRoute puts the header changes of a rule on its route.
func changeRoute(out *routev3.Route, f *mesh.Filters) {
	request, response := changesOf(f)
	q, r := headers(request), headers(response)
	out.RequestHeadersToAdd, out.RequestHeadersToRemove = q.add, q.remove
	out.ResponseHeadersToAdd, out.ResponseHeadersToRemove = r.add, r.remove
}

// changeBackend puts the header changes of a rule, and then those of a backend, on
// the backend.
func changeBackend(out *routev3.WeightedCluster_ClusterWeight, rule, backend *mesh.Filters) {
	request, response := changesOf(rule)
	moreRequest, moreResponse := changesOf(backend)
	q, r := headers(request, moreRequest), headers(response, moreResponse)
	out.RequestHeadersToAdd, out.RequestHeadersToRemove = q.add, q.remove
	out.ResponseHeadersToAdd, out.ResponseHeadersToRemove = r.add, r.remove
}

// changesBackends reports whether a backend has header changes of its own.
func changesBackends(backends []mesh.Backend) bool {
	for _, b := range backends {
		request, response := changesOf(b.Filters)
		if b.Weight > 0 && (!headers(request).empty() || !headers(response).empty()) {
			return true
		}
	}
	return false
}

// redirect answers with another place.
func redirect(r mesh.Redirect, match mesh.PathMatch) *routev3.RedirectAction {
	out := &routev3.RedirectAction{HostRedirect: r.Host, PortRedirect: uint32(r.Port), ResponseCode: redirectStatus(r.Status)}
	if r.Scheme != "" {
		out.SchemeRewriteSpecifier = &routev3.RedirectAction_SchemeRedirect{SchemeRedirect: r.Scheme}
	}
	// A port that the scheme implies is not written. Where the host is that of the
	// request it is, since the request's own port would stay.
	if r.Host != "" && (r.Scheme == "http" && r.Port == 80 || r.Scheme == "https" && r.Port == 443) {
		out.PortRedirect = 0
	}
	if r.Path == nil {
		return out
	}
	switch {
	case r.Path.Full != nil:
		out.PathRewriteSpecifier = &routev3.RedirectAction_PathRedirect{PathRedirect: absolute(*r.Path.Full)}
	case r.Path.ReplacePrefix != nil:
		prefix, regex := replacePrefix(match, *r.Path.ReplacePrefix)
		switch {
		case regex != nil:
			out.PathRewriteSpecifier = &routev3.RedirectAction_RegexRewrite{RegexRewrite: regex}
		case prefix != "":
			out.PathRewriteSpecifier = &routev3.RedirectAction_PrefixRewrite{PrefixRewrite: prefix}
		}
	}
	return out
}

func redirectStatus(status uint32) routev3.RedirectAction_RedirectResponseCode {
	switch status {
	case 301:
		return routev3.RedirectAction_MOVED_PERMANENTLY
	case 303:
		return routev3.RedirectAction_SEE_OTHER
	case 307:
		return routev3.RedirectAction_TEMPORARY_REDIRECT
	case 308:
		return routev3.RedirectAction_PERMANENT_REDIRECT
	}
	return routev3.RedirectAction_FOUND // what the Gateway API takes where nothing is said
}

// rewrite changes what the backend gets.
func rewrite(out *routev3.RouteAction, r mesh.Rewrite, match mesh.PathMatch) {
	if r.Host != "" {
		out.HostRewriteSpecifier = &routev3.RouteAction_HostRewriteLiteral{HostRewriteLiteral: r.Host}
	}
	if r.Path == nil {
		return
	}
	switch {
	case r.Path.Full != nil:
		out.RegexRewrite = substitute("^/.*$", absolute(*r.Path.Full))
	case r.Path.ReplacePrefix != nil:
		out.PrefixRewrite, out.RegexRewrite = replacePrefix(match, *r.Path.ReplacePrefix)
	}
}

// replacePrefix is the replacement of the prefix that a route matched, by whole
// path elements (Gateway API, HTTPPathModifier): /foo/bar with /foo replaced by
// /xyz or /xyz/ becomes /xyz/bar, and by / or nothing becomes /bar. Envoy's
// prefix_rewrite counts bytes, so that the latter would be //bar. Of a match
// that has no prefix nothing is replaced. Both results may be zero.
func replacePrefix(match mesh.PathMatch, by string) (prefix string, regex *matcherv3.RegexMatchAndSubstitute) {
	if match.Kind != mesh.Prefix && match.Kind != mesh.Any {
		return "", nil
	}
	from, to := strings.TrimRight(match.Value, "/"), strings.TrimRight(absolute(by), "/")
	switch {
	case from == "" && to == "":
		return "", nil
	case from == "": // the route's prefix is "/"
		return to + "/", nil
	case to == "":
		return "", substitute("^"+regexp.QuoteMeta(from)+"/?", "/")
	}
	return to, nil
}

func absolute(path string) string {
	if strings.HasPrefix(path, "/") {
		return path
	}
	return "/" + path
}

// substitute replaces what a pattern matches of the path by a literal. The query
// stays.
func substitute(pattern, by string) *matcherv3.RegexMatchAndSubstitute {
	return &matcherv3.RegexMatchAndSubstitute{
		Pattern: &matcherv3.RegexMatcher{Regex: pattern}, Substitution: strings.ReplaceAll(by, `\`, `\\`),
	}
}

// mirrors sends copies to backends. One that does not exist gets none.
func mirrors(ms []mesh.Mirror) []*routev3.RouteAction_RequestMirrorPolicy {
	var out []*routev3.RouteAction_RequestMirrorPolicy
	for _, m := range ms {
		if m.Backend.Missing || m.Numerator == 0 || m.Denominator == 0 {
			continue
		}
		out = append(out, &routev3.RouteAction_RequestMirrorPolicy{
			Cluster:         mesh.Key(m.Backend.Namespace, m.Backend.Service, m.Backend.Port),
			RuntimeFraction: &corev3.RuntimeFractionalPercent{DefaultValue: fraction(m.Numerator, m.Denominator)},
			// The backend is called by the name that the caller used.
			DisableShadowHostSuffixAppend: true,
		})
	}
	return out
}

// fraction in one of Envoy's denominators: exact where that is one of them or a
// divisor of a million, else to a millionth.
func fraction(numerator, denominator uint32) *typev3.FractionalPercent {
	switch denominator {
	case 100:
		return &typev3.FractionalPercent{Numerator: numerator, Denominator: typev3.FractionalPercent_HUNDRED}
	case 10_000:
		return &typev3.FractionalPercent{Numerator: numerator, Denominator: typev3.FractionalPercent_TEN_THOUSAND}
	}
	const million = 1_000_000
	n := (uint64(min(numerator, denominator))*million + uint64(denominator)/2) / uint64(denominator)
	return &typev3.FractionalPercent{Numerator: uint32(max(n, 1)), Denominator: typev3.FractionalPercent_MILLION}
}

// FilterParity tells what each data plane makes of the filters of a rule and its
// backends; nothing where it has none.
func FilterParity(r mesh.Route) []ParityNote {
	var used struct{ request, response, redirect, host, path, mirror bool }
	see := func(f *mesh.Filters) {
		if f == nil {
			return
		}
		used.request = used.request || !headers(f.Request).empty()
		used.response = used.response || !headers(f.Response).empty()
		used.redirect = used.redirect || f.Redirect != nil
		used.host = used.host || f.Rewrite != nil && f.Rewrite.Host != ""
		used.path = used.path || f.Rewrite != nil && f.Rewrite.Path != nil
		used.mirror = used.mirror || len(f.Mirrors) > 0
	}
	see(r.Filters)
	for _, b := range r.Backends {
		see(b.Filters)
	}
	const grpc = "gRPC changes no request by xDS"
	var p parity
	if used.request {
		p.note("filters.requestHeaderModifier", Honoured, "", Ignored, grpc)
	}
	if used.response {
		p.note("filters.responseHeaderModifier", Honoured, "", Ignored, grpc)
	}
	if used.redirect {
		p.note("filters.requestRedirect", Honoured, "", Ignored, "calls that the rule matches fail: gRPC follows no redirect")
	}
	if used.host {
		p.note("filters.urlRewrite.hostname", Honoured, "", Ignored, grpc)
	}
	if used.path {
		p.note("filters.urlRewrite.path", Honoured, "", Ignored, grpc)
	}
	if used.mirror {
		p.note("filters.requestMirror", Honoured, "", Ignored, "gRPC sends no copies")
	}
	return p
}
