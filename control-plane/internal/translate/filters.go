package translate

import (
	"cmp"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
)

// maxHeaders is the limit of each list of HTTPHeaderFilter, which a folder does
// not enforce.
const maxHeaders = 16

// filters reads the filters of a rule. One that is invalid or not supported makes
// r bad: requests of its rule are answered 500 rather than sent without it.
// prefixes says that all matches of the rule are prefixes of the path, and
// backends that it has any.
func (b *builder) filters(r *report, field string, route routeOf, in []gatewayv1.HTTPRouteFilter, prefixes, backends bool) *mesh.Filters {
	if len(in) == 0 {
		return nil
	}
	out := &mesh.Filters{}
	seen := map[gatewayv1.HTTPRouteFilterType]bool{}
	for i := range in {
		f, ff := &in[i], at(field, i)
		if seen[f.Type] && f.Type != gatewayv1.HTTPRouteFilterRequestMirror {
			r.add(ff, ReasonInvalid, "a second filter %s; write it once", f.Type)
			continue
		}
		seen[f.Type] = true
		switch {
		case f.Type == gatewayv1.HTTPRouteFilterRequestHeaderModifier && f.RequestHeaderModifier != nil:
			out.Request = headerChange(r, ff+".requestHeaderModifier", f.RequestHeaderModifier)
		case f.Type == gatewayv1.HTTPRouteFilterResponseHeaderModifier && f.ResponseHeaderModifier != nil:
			out.Response = headerChange(r, ff+".responseHeaderModifier", f.ResponseHeaderModifier)
		case f.Type == gatewayv1.HTTPRouteFilterRequestRedirect && f.RequestRedirect != nil:
			out.Redirect = redirect(r, ff+".requestRedirect", f.RequestRedirect, prefixes)
			if backends {
				r.add(ff, ReasonInvalid, "a rule that redirects sends nothing to a backend; delete the filter or the backendRefs")
			}
		case f.Type == gatewayv1.HTTPRouteFilterURLRewrite && f.URLRewrite != nil:
			out.Rewrite = rewrite(r, ff+".urlRewrite", f.URLRewrite, prefixes)
		case f.Type == gatewayv1.HTTPRouteFilterRequestMirror && f.RequestMirror != nil:
			if m := b.mirror(r, ff+".requestMirror", route, f.RequestMirror); m != nil {
				out.Mirrors = append(out.Mirrors, *m)
			}
		case isHTTPFilter(f.Type):
			r.add(ff, ReasonInvalid, "filter %s has no settings; write its field of the same name", f.Type)
		default:
			r.add(ff+".type", ReasonUnsupported, "filter %q is not supported; requests of this rule are answered 500 until it is removed", f.Type)
		}
	}
	if seen[gatewayv1.HTTPRouteFilterRequestRedirect] && seen[gatewayv1.HTTPRouteFilterURLRewrite] {
		r.add(field, ReasonIncompatibleFilters, "RequestRedirect and URLRewrite exclude each other: what is redirected is not sent on; delete one")
	}
	if noChange(out.Request) && noChange(out.Response) && out.Redirect == nil && out.Rewrite == nil && len(out.Mirrors) == 0 {
		return nil
	}
	return out
}

func noChange(c mesh.HeaderChange) bool { return len(c.Set)+len(c.Add)+len(c.Remove) == 0 }

func isHTTPFilter(t gatewayv1.HTTPRouteFilterType) bool {
	switch t {
	case gatewayv1.HTTPRouteFilterRequestHeaderModifier, gatewayv1.HTTPRouteFilterResponseHeaderModifier, gatewayv1.HTTPRouteFilterRequestRedirect,
		gatewayv1.HTTPRouteFilterURLRewrite, gatewayv1.HTTPRouteFilterRequestMirror:
		return true
	default:
		return false
	}
}

// backendFilters reads the filters of a backendRef: changes of header fields, and
// nothing else.
func (b *builder) backendFilters(r *report, field string, route routeOf, in []gatewayv1.HTTPRouteFilter, consequence string) *mesh.Filters {
	for i := range in {
		switch in[i].Type {
		case gatewayv1.HTTPRouteFilterRequestHeaderModifier, gatewayv1.HTTPRouteFilterResponseHeaderModifier:
		default:
			r.add(at(field, i)+".type", ReasonUnsupported, "filter %q of a backend is not supported, only changes of header fields are; move it to the rule, or remove it"+consequence, in[i].Type)
			return nil
		}
	}
	return b.filters(r, field, route, in, false, false)
}

// grpcFilters are filters in the words of HTTPRoute, which has all of GRPCRoute's.
func grpcFilters(in []gatewayv1.GRPCRouteFilter) []gatewayv1.HTTPRouteFilter {
	var out []gatewayv1.HTTPRouteFilter
	for _, f := range in {
		out = append(out, gatewayv1.HTTPRouteFilter{
			Type: gatewayv1.HTTPRouteFilterType(f.Type), RequestHeaderModifier: f.RequestHeaderModifier,
			ResponseHeaderModifier: f.ResponseHeaderModifier, RequestMirror: f.RequestMirror, ExtensionRef: f.ExtensionRef,
		})
	}
	return out
}

// headerChange reads a change of header fields. No name may be in it twice.
func headerChange(r *report, field string, in *gatewayv1.HTTPHeaderFilter) mesh.HeaderChange {
	var out mesh.HeaderChange
	seen := map[string]bool{}
	name := func(field, s string) (string, bool) {
		lower := strings.ToLower(s)
		switch {
		case !isToken(s):
			r.add(field, ReasonInvalid, "%q is not a name; write letters, digits and !#$%%&'*+-.^_`|~", s)
		case lower == "host":
			r.add(field, ReasonInvalid, "%q cannot be changed as a header field; use filter URLRewrite with hostname", s)
		case isFraming(lower):
			r.add(field, ReasonInvalid, "%q says how the message is framed on one connection, which the proxy decides; remove it", s)
		case seen[lower]:
			r.add(field, ReasonInvalid, "%q is in this filter already; what happens to a field is said once, values joined by commas", s)
		default:
			seen[lower] = true
			return lower, true
		}
		return "", false
	}
	list := func(field string, in []gatewayv1.HTTPHeader) []mesh.Header {
		if n := len(in); n > maxHeaders {
			r.add(field, ReasonInvalid, "%d entries; at most %d", n, maxHeaders)
			return nil
		}
		var out []mesh.Header
		for i, h := range in {
			hf := at(field, i)
			n, ok := name(hf+".name", string(h.Name))
			if !isFieldValue(h.Value) {
				r.add(hf+".value", ReasonInvalid, "%q cannot be the value of a field; write 1 to %d printable characters, no blank at either end", h.Value, maxValue)
				ok = false
			}
			if ok {
				out = append(out, mesh.Header{Name: n, Value: h.Value})
			}
		}
		slices.SortFunc(out, func(a, b mesh.Header) int { return cmp.Compare(a.Name, b.Name) })
		return out
	}
	out.Set = list(field+".set", in.Set)
	out.Add = list(field+".add", in.Add)
	if n := len(in.Remove); n > maxHeaders {
		r.add(field+".remove", ReasonInvalid, "%d entries; at most %d", n, maxHeaders)
		return out
	}
	for i, s := range in.Remove {
		if n, ok := name(at(field+".remove", i), s); ok {
			out.Remove = append(out.Remove, n)
		}
	}
	slices.Sort(out.Remove)
	return out
}

// isFraming: fields of RFC 9112 and RFC 9110, 7.6.1. To change one is request
// smuggling.
func isFraming(name string) bool {
	switch name {
	case "connection", "content-length", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade":
		return true
	default:
		return false
	}
}

// isFieldValue is RFC 9110, 5.5, without what is obsolete.
func isFieldValue(s string) bool {
	if s == "" || len(s) > maxValue || strings.TrimSpace(s) != s {
		return false
	}
	for _, c := range []byte(s) {
		if c != '\t' && (c < ' ' || c > '~') {
			return false
		}
	}
	return true
}

func redirect(r *report, field string, in *gatewayv1.HTTPRequestRedirectFilter, prefixes bool) *mesh.Redirect {
	out := &mesh.Redirect{Status: 302}
	if in.Scheme != nil {
		out.Scheme = *in.Scheme
		if out.Scheme != "http" && out.Scheme != "https" {
			r.add(field+".scheme", ReasonUnsupported, "%q is not a scheme of HTTP; write http or https", out.Scheme)
		}
	}
	out.Host = hostname(r, field+".hostname", in.Hostname)
	if in.Port != nil {
		if *in.Port < 1 || *in.Port > 65535 {
			r.add(field+".port", ReasonInvalid, "%d is not a port; write 1 to 65535", *in.Port)
		}
		out.Port = uint16(*in.Port)
	}
	if in.StatusCode != nil {
		switch *in.StatusCode {
		case 301, 302, 303, 307, 308:
			out.Status = uint32(*in.StatusCode)
		default:
			r.add(field+".statusCode", ReasonUnsupported, "%d is not the status of a redirect; write 301, 302, 303, 307 or 308", *in.StatusCode)
		}
	}
	out.Path = pathChange(r, field+".path", in.Path, prefixes)
	return out
}

func rewrite(r *report, field string, in *gatewayv1.HTTPURLRewriteFilter, prefixes bool) *mesh.Rewrite {
	return &mesh.Rewrite{
		Host: hostname(r, field+".hostname", in.Hostname),
		Path: pathChange(r, field+".path", in.Path, prefixes),
	}
}

func hostname(r *report, field string, in *gatewayv1.PreciseHostname) string {
	if in == nil {
		return ""
	}
	if len(validation.IsDNS1123Subdomain(string(*in))) > 0 {
		r.add(field, ReasonInvalid, "%q is not a host name; write a DNS name in lower case, without port", *in)
		return ""
	}
	return string(*in)
}

func pathChange(r *report, field string, in *gatewayv1.HTTPPathModifier, prefixes bool) *mesh.PathChange {
	if in == nil {
		return nil
	}
	var value *string
	out := &mesh.PathChange{}
	switch in.Type {
	case gatewayv1.FullPathHTTPPathModifier:
		field += ".replaceFullPath"
		if value = in.ReplaceFullPath; value != nil {
			v := cmp.Or(*value, "/")
			out.Full = &v
		}
	case gatewayv1.PrefixMatchHTTPPathModifier:
		field += ".replacePrefixMatch"
		if value = in.ReplacePrefixMatch; value != nil {
			v := cmp.Or(*value, "/")
			out.ReplacePrefix = &v
		}
		if !prefixes {
			r.add(field, ReasonInvalid, "there is no prefix to replace: every match of the rule must have a path of type PathPrefix; correct the matches, or write ReplaceFullPath")
		}
	default:
		r.add(field+".type", ReasonUnsupported, "%q is not a change of the path; write ReplaceFullPath or ReplacePrefixMatch", in.Type)
		return nil
	}
	switch {
	case value == nil:
		r.add(field, ReasonInvalid, "missing; write the path")
	case len(*value) > maxPath:
		r.add(field, ReasonInvalid, "has %d bytes; at most %d", len(*value), maxPath)
	case !isPath(*value):
		r.add(field, ReasonInvalid, "%q is not a path; begin it with / and write printable characters without blank, ? and #", *value)
	}
	return out
}

// isPath: some write an empty one for the root.
func isPath(s string) bool {
	if s == "" {
		return true
	}
	for _, c := range []byte(s) {
		if c <= ' ' || c > '~' || c == '?' || c == '#' {
			return false
		}
	}
	return strings.HasPrefix(s, "/")
}

// mirror returns nil where the backend does not resolve: requests are not copied
// then, but answered as ever (Gateway API, HTTPRequestMirrorFilter.backendRef).
func (b *builder) mirror(rule *report, field string, route routeOf, in *gatewayv1.HTTPRequestMirrorFilter) *mesh.Mirror {
	out := &mesh.Mirror{Numerator: 100, Denominator: 100}
	switch {
	case in.Percent != nil && in.Fraction != nil:
		rule.add(field, ReasonInvalid, "has percent and fraction; write one of them")
	case in.Percent != nil:
		if *in.Percent < 0 || *in.Percent > 100 {
			rule.add(field+".percent", ReasonInvalid, "%d is out of range; write 0 to 100", *in.Percent)
			return nil
		}
		out.Numerator = uint32(*in.Percent)
	case in.Fraction != nil:
		n, d := in.Fraction.Numerator, deref(in.Fraction.Denominator, 100)
		if n < 0 || d < 1 || n > d {
			rule.add(field+".fraction", ReasonInvalid, "%d/%d is not a share; write a numerator from 0 to the denominator", n, d)
			return nil
		}
		out.Numerator, out.Denominator = uint32(n), uint32(d)
	}
	const consequence = "; until then requests are not copied"
	r := rule.part()
	out.Backend = b.backendRef(rule, r, field+".backendRef", route, &gatewayv1.BackendRef{BackendObjectReference: in.BackendRef}, consequence)
	if p := b.backendPort(out.Backend); p != nil && !b.takes(route.kind, p) {
		r.add(field+".backendRef.port", ReasonUnsupportedProtocol, "port %s of Service %s %s, not %s; name another"+consequence, p.describe(), p.service.key, p.speaks(), wanted(route.kind))
	}
	if r.bad || out.Numerator == 0 {
		return nil
	}
	return out
}

// takes says whether requests of a kind of route can be sent to the port.
func (b *builder) takes(kind string, p *port) bool {
	if kind == kindGRPCRoute {
		return speaksGRPC(p.declared) || p.declared == mesh.Unknown
	}
	return p.declared.MayBeHTTP()
}

func wanted(kind string) string {
	if kind == kindGRPCRoute {
		return "gRPC"
	}
	return "HTTP"
}

// cloneFilters: routes share no memory.
func cloneFilters(in *mesh.Filters) *mesh.Filters {
	if in == nil {
		return nil
	}
	out := *in
	for _, c := range []*mesh.HeaderChange{&out.Request, &out.Response} {
		*c = mesh.HeaderChange{Set: slices.Clone(c.Set), Add: slices.Clone(c.Add), Remove: slices.Clone(c.Remove)}
	}
	out.Mirrors = slices.Clone(out.Mirrors)
	return &out
}
