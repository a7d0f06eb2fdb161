package patch

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// annotationExclude was the name before inbound and outbound were told apart.
const annotationExclude = "outrigger.dev/exclude-ports"

// wish is what the pod's annotations ask for, checked.
type wish struct {
	resources corev1.ResourceRequirements
	logLevel  string
	mtls      string // what the control plane is to say, or the sidecar's default, where empty
	upstreams []bootstrap.Upstream
	inbounds  []bootstrap.Inbound
	envoy     bool
	capture   bool
	completes bool // the pod ends when its containers have
	// What is not captured: lists as netinit reads them.
	excludeInbound, excludeOutbound, excludeCIDRs, includeCIDRs string
}

func read(pod *corev1.Pod, ns Namespace, s Settings, workload string) (wish, error) {
	w := wish{logLevel: s.logLevel(), capture: true, completes: completes(pod)}
	a := pod.Annotations
	for _, key := range slices.Sorted(maps.Keys(a)) { // before anything quotes them
		limit := maxAnnotation
		if key == AnnotationUpstreams || key == AnnotationInbound {
			limit = maxList
		}
		if n := len(a[key]); n > limit && strings.HasPrefix(key, "outrigger.dev/") {
			return w, fmt.Errorf("annotation %s has %d bytes: at most %d", clip(key), n, limit)
		}
	}
	switch v, set := a[AnnotationProxy]; {
	case !set || v == "outrigger":
	case v != "envoy":
		return w, fmt.Errorf("annotation %s=%q: write outrigger, envoy, or remove it", AnnotationProxy, clip(v))
	case s.EnvoyImage == "":
		return w, fmt.Errorf("annotation %s=%q: the injector has been given no image of Envoy; start it with --envoy-image, or write outrigger", AnnotationProxy, v)
	case !s.NativeSidecar:
		return w, fmt.Errorf("annotation %s=%q needs native sidecars (Kubernetes 1.29), which the injector has been told not to use; write outrigger", AnnotationProxy, v)
	default:
		w.envoy = true
	}
	if v, set := a[AnnotationLogLevel]; set {
		if !slices.Contains(logLevels(), v) {
			return w, fmt.Errorf("annotation %s=%q: write debug, info, warn or error", AnnotationLogLevel, clip(v))
		}
		w.logLevel = v
	}
	if v, set := a[AnnotationMTLS]; set {
		if !slices.Contains([]string{bootstrap.MTLSOff, bootstrap.MTLSPermissive, bootstrap.MTLSStrict}, v) {
			return w, fmt.Errorf("annotation %s=%q: write off, permissive or strict", AnnotationMTLS, clip(v))
		}
		w.mtls = v
	}
	var err error
	if w.resources, err = s.resources(a); err != nil {
		return w, err
	}
	if err := w.readCapture(a); err != nil {
		return w, err
	}
	return w, w.readListeners(a, ns, s, workload)
}

func (w *wish) readCapture(a map[string]string) error {
	switch v, set := a[AnnotationCapture]; {
	case !set || v == "true":
	case v == "false":
		w.capture = false
	default:
		return fmt.Errorf("annotation %s=%q: write true or false", AnnotationCapture, clip(v))
	}
	if v, set := a[annotationExclude]; set {
		return fmt.Errorf("annotation %s=%q is no longer known: write %s for ports of the pod, %s for ports that it calls", annotationExclude, clip(v), AnnotationExcludeInboundPorts, AnnotationExcludeOutboundPorts)
	}
	for _, f := range []struct {
		annotation string
		list       *string
		check      func(string) (string, error)
	}{
		{AnnotationExcludeInboundPorts, &w.excludeInbound, inboundPort},
		{AnnotationExcludeOutboundPorts, &w.excludeOutbound, port},
		{AnnotationExcludeOutboundCIDRs, &w.excludeCIDRs, cidr},
		{AnnotationIncludeOutboundCIDRs, &w.includeCIDRs, cidr},
	} {
		var items []string
		for item := range list(a[f.annotation]) {
			item, err := f.check(item)
			if err != nil {
				return fmt.Errorf("annotation %s: %w", f.annotation, err)
			}
			items = append(items, item)
		}
		if len(items) > maxExclusions {
			return fmt.Errorf("annotation %s has %d items: at most %d", f.annotation, len(items), maxExclusions)
		}
		if v, set := a[f.annotation]; set && len(items) == 0 {
			return fmt.Errorf("annotation %s=%q names nothing: write a comma list, or remove it", f.annotation, clip(v))
		}
		*f.list = strings.Join(items, ",")
	}
	return nil
}

// port, inboundPort and cidr check one item of a list and write it as everybody
// does.
func port(item string) (string, error) {
	n, err := strconv.ParseUint(item, 10, 16)
	if err != nil || n == 0 {
		return "", fmt.Errorf("%q is not a port from 1 to 65535; write a comma list, for example 9092,5432", clip(item))
	}
	return strconv.FormatUint(n, 10), nil
}

func inboundPort(item string) (string, error) {
	item, err := port(item)
	if err == nil && (item == strconv.Itoa(bootstrap.PortOutbound) || item == strconv.Itoa(bootstrap.PortInbound)) {
		err = fmt.Errorf("%s is a port of the proxy itself, which nobody calls directly; remove it", item)
	}
	return item, err
}

func cidr(item string) (string, error) {
	p, err := netip.ParsePrefix(item)
	if err != nil || p.Addr().Is4In6() {
		return "", fmt.Errorf("%q is not a CIDR; write a comma list, for example 10.0.0.0/8,fd00::/8, and one address as 192.0.2.1/32", clip(item))
	}
	if p != p.Masked() {
		return "", fmt.Errorf("%q has bits behind its mask; write %s, or for one address %s", item, p.Masked(), netip.PrefixFrom(p.Addr(), p.Addr().BitLen()))
	}
	return p.String(), nil
}

func (w *wish) readListeners(a map[string]string, ns Namespace, s Settings, workload string) error {
	for item := range list(a[AnnotationUpstreams]) {
		u, err := bootstrap.ParseUpstream(clip(item))
		if err == nil {
			err = w.listenable(item, u.Listen.Port(), "which the application could not know")
		}
		if err != nil {
			return fmt.Errorf("annotation %s: %w", AnnotationUpstreams, err)
		}
		w.upstreams = append(w.upstreams, u)
	}
	for item := range list(a[AnnotationInbound]) {
		in, err := bootstrap.ParseInbound(clip(item))
		if err == nil {
			err = w.listenable(item, in.Listen.Port(), "which nobody could know")
		}
		if err != nil {
			return fmt.Errorf("annotation %s: %w", AnnotationInbound, err)
		}
		w.inbounds = append(w.inbounds, in)
	}
	// The sidecar checks the same at its start; here the user sees it.
	conf := bootstrap.Config{
		Namespace: ns.Name, Workload: workload, Instance: "pod", ServiceAccount: "account",
		ControlPlane: s.ControlPlane, Upstreams: w.upstreams, Inbounds: w.inbounds,
	}
	if ns.Name == "" {
		conf.Namespace = "namespace"
	}
	if err := conf.Validate(); err != nil {
		return fmt.Errorf("annotations %s and %s: %w", AnnotationUpstreams, AnnotationInbound, err)
	}
	return nil
}

// ownPorts are the proxy's, by what they are for.
func ownPorts(capture bool) map[int32]string {
	own := map[int32]string{bootstrap.PortAdmin: "admin", bootstrap.PortMetrics: "metrics", bootstrap.PortHealth: "health"}
	if capture {
		own[bootstrap.PortOutbound], own[bootstrap.PortInbound] = "outbound", "inbound"
	}
	return own
}

func (w *wish) listenable(item string, port uint16, unknown string) error {
	if port == 0 {
		return fmt.Errorf("%q listens on port 0, %s; write a port", item, unknown)
	}
	if what, taken := ownPorts(w.capture)[int32(port)]; taken {
		return fmt.Errorf("%q listens on the sidecar's own %s port; choose another", item, what)
	}
	return nil
}

// clip shortens what a message quotes.
func clip(s string) string {
	const most = 512
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "..."
}

// list yields the items of a comma list without the blanks around them.
func list(s string) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		for item := range strings.SplitSeq(s, ",") {
			if item = strings.TrimSpace(item); item != "" && !yield(item) {
				return
			}
		}
	}
}

func (s Settings) resources(annotations map[string]string) (corev1.ResourceRequirements, error) {
	var r corev1.ResourceRequirements
	for _, f := range []struct {
		annotation, fallback string
		list                 *corev1.ResourceList
		name                 corev1.ResourceName
	}{
		{AnnotationCPU, s.CPU, &r.Requests, corev1.ResourceCPU},
		{AnnotationMemory, s.Memory, &r.Requests, corev1.ResourceMemory},
		{AnnotationCPULimit, s.CPULimit, &r.Limits, corev1.ResourceCPU},
		{AnnotationMemoryLimit, s.MemoryLimit, &r.Limits, corev1.ResourceMemory},
	} {
		v, where := annotations[f.annotation], "annotation "+f.annotation
		if v == "" {
			v, where = f.fallback, "default of "+f.annotation
		}
		if v == "" {
			continue
		}
		q, err := resource.ParseQuantity(v)
		if err != nil || q.Sign() <= 0 {
			return r, fmt.Errorf("%s=%q is not a positive quantity: write for example 100m of CPU, 64Mi of memory", where, clip(v))
		}
		if *f.list == nil {
			*f.list = corev1.ResourceList{}
		}
		(*f.list)[f.name] = q
	}
	for _, f := range []struct {
		name           corev1.ResourceName
		request, limit string
	}{{corev1.ResourceCPU, AnnotationCPU, AnnotationCPULimit}, {corev1.ResourceMemory, AnnotationMemory, AnnotationMemoryLimit}} {
		request, limit := r.Requests[f.name], r.Limits[f.name]
		if _, limited := r.Limits[f.name]; limited && request.Cmp(limit) > 0 {
			return r, fmt.Errorf("annotation %s: the request %s is over the limit %s; raise %s", f.request, request.String(), limit.String(), f.limit)
		}
	}
	return r, nil
}

// warnings are what the user should know of an injected pod, beside more.
func warnings(pod *corev1.Pod, w wish, more []string) []string {
	out := more
	known := []string{
		AnnotationProxy, AnnotationCPU, AnnotationMemory, AnnotationCPULimit, AnnotationMemoryLimit, AnnotationLogLevel, AnnotationMTLS,
		AnnotationUpstreams, AnnotationInbound, AnnotationCapture, AnnotationExcludeInboundPorts, AnnotationExcludeOutboundPorts,
		AnnotationExcludeOutboundCIDRs, AnnotationIncludeOutboundCIDRs, AnnotationStatus, AnnotationReason, "outrigger.dev/logs",
	}
	for key := range pod.Annotations {
		if strings.HasPrefix(key, "outrigger.dev/") && !slices.Contains(known, key) {
			out = append(out, fmt.Sprintf("annotation %s is not known and has no effect", clip(key)))
		}
	}
	if !w.capture {
		for _, key := range []string{AnnotationExcludeInboundPorts, AnnotationExcludeOutboundPorts, AnnotationExcludeOutboundCIDRs, AnnotationIncludeOutboundCIDRs} {
			if pod.Annotations[key] != "" {
				out = append(out, fmt.Sprintf("annotation %s has no effect beside %s=false: only what %s and %s name passes through the sidecar", key, AnnotationCapture, AnnotationUpstreams, AnnotationInbound))
			}
		}
	}
	own := ownPorts(w.capture)
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		for _, p := range c.Ports {
			if _, taken := own[p.ContainerPort]; taken && c.Name != ContainerName {
				out = append(out, fmt.Sprintf("container %s uses port %d, which is the sidecar's: one of them will not start", c.Name, p.ContainerPort))
			}
		}
		if l := c.Lifecycle; w.capture && w.mtls == bootstrap.MTLSStrict && l != nil {
			for name, hook := range map[string]*corev1.LifecycleHandler{"postStart": l.PostStart, "preStop": l.PreStop} {
				if hook != nil && hook.HTTPGet != nil {
					out = append(out, fmt.Sprintf("container %s: kubelet calls the %s hook without a certificate, which %s=%s refuses; name its port in %s", c.Name, name, AnnotationMTLS, w.mtls, AnnotationExcludeInboundPorts))
				}
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}
