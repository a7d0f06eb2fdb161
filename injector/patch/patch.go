// Package patch puts the sidecar into pods: pod + namespace + settings in,
// patched pod and the reason for it out.
//
// It is pure and knows the rules of injection, the labels and annotations that
// users write, and the form of the sidecar's container. It does not know
// admission reviews, HTTP or the cluster; the namespace's labels are an
// argument. The injector's webhook and the command line's offline injection call
// it, and give the same answer because of it.
//
// A pod that asks for injection is never left out without a word: it is
// injected, or refused with the annotation, its value and the remedy, or, where
// nobody is at fault, skipped with the reason in an annotation.
package patch

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	workloads "github.com/outrigger-mesh/outrigger/control-plane/identity/workload"
	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// Labels and annotations that users write.
const (
	// LabelInjection on a namespace or, with precedence, on a pod: enabled or disabled.
	LabelInjection = "outrigger.dev/injection"

	AnnotationProxy       = "outrigger.dev/proxy"              // outrigger; envoy is refused so far
	AnnotationCPU         = "outrigger.dev/proxy-cpu"          // request, for example 50m
	AnnotationMemory      = "outrigger.dev/proxy-memory"       // request, for example 64Mi
	AnnotationCPULimit    = "outrigger.dev/proxy-cpu-limit"    // limit
	AnnotationMemoryLimit = "outrigger.dev/proxy-memory-limit" // limit
	AnnotationLogLevel    = "outrigger.dev/log-level"          // debug, info, warn or error
	AnnotationMTLS        = "outrigger.dev/mtls"               // off, permissive or strict: mutual TLS of the inbound ports
	AnnotationUpstreams   = "outrigger.dev/upstreams"          // comma list of payments.shop:80=127.0.0.1:4001
	AnnotationInbound     = "outrigger.dev/inbound"            // comma list of http:0.0.0.0:5001=127.0.0.1:8080
	AnnotationExclude     = "outrigger.dev/exclude-ports"      // comma list of ports; nothing is captured so far
)

// Annotations that the injector writes.
const (
	AnnotationStatus = "outrigger.dev/status" // StatusInjected or StatusSkipped
	AnnotationReason = "outrigger.dev/reason" // why it was skipped
	StatusInjected   = "injected"
	StatusSkipped    = "skipped"
)

// Names inside the pod.
const (
	// ContainerName of the sidecar. A container of this name in the user's pod is
	// merged over ours.
	ContainerName = "outrigger-proxy"
	VolumeName    = "outrigger-state"
	StateDir      = "/var/lib/outrigger"
	// UserID of the sidecar, and its group.
	UserID = 1337
)

// Limits of what a pod may ask for.
const (
	maxAnnotation = 64 << 10 // bytes of one annotation's list
	stateSize     = "64Mi"
	// startSeconds is how long a native sidecar may wait for its first
	// configuration before kubelet restarts it.
	startSeconds = 600
)

// Namespace of the pod.
type Namespace struct {
	Name   string
	Labels map[string]string
}

// Settings are the same for every pod.
type Settings struct {
	Image        string            // of the sidecar; required
	PullPolicy   corev1.PullPolicy // kubelet's default where empty
	ControlPlane string            // host:port of the xDS server; required
	TrustDomain  string            // the sidecar's default where empty
	// NativeSidecar makes the sidecar an init container with restartPolicy Always
	// (Kubernetes 1.29). Without it the sidecar is a plain container, and pods that
	// run to completion are skipped, because they would never complete.
	NativeSidecar bool
	LogLevel      string // info where empty
	// Resources where the pod's annotations do not say; none where empty.
	CPU, Memory, CPULimit, MemoryLimit string
}

// Validate names the first setting that cannot be right, its value and the remedy.
func (s Settings) Validate() error {
	if s.Image == "" || strings.ContainsAny(s.Image, " \t\n") {
		return fmt.Errorf("image %q is not an image reference: name the sidecar's image", s.Image)
	}
	switch s.PullPolicy {
	case "", corev1.PullAlways, corev1.PullIfNotPresent, corev1.PullNever:
	default:
		return fmt.Errorf("pull policy %q: write Always, IfNotPresent or Never", s.PullPolicy)
	}
	if s.ControlPlane == "" || strings.ContainsAny(s.ControlPlane, " \t\n$") || !strings.Contains(s.ControlPlane, ":") {
		return fmt.Errorf("control plane %q is not host:port, for example outrigger-control-plane.outrigger-system:15012", s.ControlPlane)
	}
	if strings.ContainsAny(s.TrustDomain, " \t\n$/") {
		return fmt.Errorf("trust domain %q is not a domain, for example cluster.local", s.TrustDomain)
	}
	if !slices.Contains(logLevels(), s.logLevel()) {
		return fmt.Errorf("log level %q: write debug, info, warn or error", s.LogLevel)
	}
	if _, err := s.resources(nil); err != nil {
		return err
	}
	return nil
}

func logLevels() []string { return []string{"debug", "info", "warn", "error"} }

func (s Settings) logLevel() string {
	if s.LogLevel == "" {
		return "info"
	}
	return s.LogLevel
}

// Decision is what became of a pod, for people.
type Decision struct {
	// Object is kind, namespace and name where a manifest was injected; empty for
	// a pod.
	Object   string
	Injected bool
	// Reason in one sentence, always set.
	Reason string
	// Warnings of things that have no effect.
	Warnings []string
	// Err is set where the pod asks for something that cannot be given. It must
	// be refused: running it without the sidecar is not what it asks for.
	Err error
}

// Pod decides about a pod and injects it. It returns a deep copy, changed or
// not; pod itself is never changed. A pod that has been injected comes back as it
// is, so the webhook may be invoked again.
func Pod(pod *corev1.Pod, ns Namespace, s Settings) (*corev1.Pod, Decision) {
	return inject(pod, ns, s, workload(pod))
}

func inject(pod *corev1.Pod, ns Namespace, s Settings, workload string) (*corev1.Pod, Decision) {
	out := pod.DeepCopy()
	no := func(format string, args ...any) (*corev1.Pod, Decision) {
		return out, Decision{Reason: fmt.Sprintf(format, args...)}
	}
	refuse := func(err error) (*corev1.Pod, Decision) {
		return out, Decision{Reason: err.Error(), Err: err}
	}
	// skip is for pods that asked and cannot be helped.
	skip := func(reason string) (*corev1.Pod, Decision) {
		annotate(out, AnnotationStatus, StatusSkipped)
		annotate(out, AnnotationReason, reason)
		return out, Decision{Reason: reason}
	}

	switch ns.Name {
	case "kube-system", "kube-public", "kube-node-lease":
		return no("namespace %s belongs to Kubernetes and is never injected", ns.Name)
	}
	if _, mirror := pod.Annotations[corev1.MirrorPodAnnotationKey]; mirror {
		return no("a mirror pod: kubelet runs it from a file of the node")
	}
	asked, why, err := wanted(pod, ns)
	if err != nil {
		return refuse(err)
	}
	if !asked {
		return no("%s", why)
	}
	if pod.Annotations[AnnotationStatus] == StatusInjected && slices.ContainsFunc(slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers), isProxy) {
		return no("already injected")
	}
	if pod.Spec.OS != nil && pod.Spec.OS.Name == corev1.Windows {
		return skip("windows: the sidecar runs on Linux only")
	}
	if pod.Spec.HostNetwork {
		return skip("hostNetwork: the sidecar's ports would be the node's, and two such pods would collide; remove hostNetwork, or label the pod " + LabelInjection + "=disabled")
	}
	if !s.NativeSidecar && pod.Spec.RestartPolicy != "" && pod.Spec.RestartPolicy != corev1.RestartPolicyAlways {
		return skip("it runs to completion, which a plain sidecar container would prevent; use native sidecars (Kubernetes 1.29), or label the pod " + LabelInjection + "=disabled")
	}
	wish, err := read(pod, ns, s, workload)
	if err != nil {
		return refuse(err)
	}
	container := sidecar(s, wish, workload)
	override, err := takeOverride(out)
	if err != nil {
		return refuse(err)
	}
	if override != nil {
		merge(&container, override, s.NativeSidecar)
	}
	if s.NativeSidecar {
		always := corev1.ContainerRestartPolicyAlways
		container.RestartPolicy = &always
		// First, so that the user's own init containers can call through it.
		out.Spec.InitContainers = slices.Insert(out.Spec.InitContainers, 0, container)
	} else {
		if len(out.Spec.Containers) > 0 && out.Annotations["kubectl.kubernetes.io/default-container"] == "" {
			annotate(out, "kubectl.kubernetes.io/default-container", out.Spec.Containers[0].Name)
		}
		// First: kubelet starts containers in order.
		out.Spec.Containers = slices.Insert(out.Spec.Containers, 0, container)
	}
	if !slices.ContainsFunc(out.Spec.Volumes, func(v corev1.Volume) bool { return v.Name == VolumeName }) {
		size := resource.MustParse(stateSize)
		out.Spec.Volumes = append(out.Spec.Volumes, corev1.Volume{
			Name: VolumeName, VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{SizeLimit: &size}},
		})
	}
	annotate(out, AnnotationStatus, StatusInjected)
	delete(out.Annotations, AnnotationReason)
	return out, Decision{Injected: true, Reason: why, Warnings: warnings(pod)}
}

func annotate(pod *corev1.Pod, key, value string) {
	if pod.Annotations == nil {
		pod.Annotations = map[string]string{}
	}
	pod.Annotations[key] = value
}

func isProxy(c corev1.Container) bool { return c.Name == ContainerName }

// wanted applies the labels: the pod's wins over the namespace's.
func wanted(pod *corev1.Pod, ns Namespace) (asked bool, why string, err error) {
	for _, l := range []struct {
		where  string
		labels map[string]string
	}{{"pod", pod.Labels}, {"namespace " + ns.Name, ns.Labels}} {
		v, set := l.labels[LabelInjection]
		if !set {
			continue
		}
		switch v {
		case "enabled", "disabled":
			return v == "enabled", fmt.Sprintf("label %s=%s on the %s", LabelInjection, v, l.where), nil
		default:
			return false, "", fmt.Errorf("label %s=%q on the %s: write enabled or disabled", LabelInjection, v, l.where)
		}
	}
	return false, fmt.Sprintf("neither the pod nor namespace %s has the label %s", ns.Name, LabelInjection), nil
}

// wish is what the pod's annotations ask for, checked.
type wish struct {
	resources corev1.ResourceRequirements
	logLevel  string
	mtls      string // the sidecar's default where empty
	upstreams []bootstrap.Upstream
	inbounds  []bootstrap.Inbound
}

func read(pod *corev1.Pod, ns Namespace, s Settings, workload string) (wish, error) {
	w := wish{logLevel: s.logLevel()}
	a := pod.Annotations
	switch v, set := a[AnnotationProxy]; {
	case !set || v == "outrigger":
	case v == "envoy":
		return w, fmt.Errorf("annotation %s=%q is not supported by the injector yet: write outrigger or remove it, or label the pod %s=disabled and add Envoy to the pod yourself", AnnotationProxy, v, LabelInjection)
	default:
		return w, fmt.Errorf("annotation %s=%q: write outrigger or remove it", AnnotationProxy, v)
	}
	if v, set := a[AnnotationLogLevel]; set {
		if !slices.Contains(logLevels(), v) {
			return w, fmt.Errorf("annotation %s=%q: write debug, info, warn or error", AnnotationLogLevel, v)
		}
		w.logLevel = v
	}
	if v, set := a[AnnotationMTLS]; set {
		if !slices.Contains([]string{bootstrap.MTLSOff, bootstrap.MTLSPermissive, bootstrap.MTLSStrict}, v) {
			return w, fmt.Errorf("annotation %s=%q: write off, permissive or strict", AnnotationMTLS, v)
		}
		w.mtls = v
	}
	var err error
	if w.resources, err = s.resources(a); err != nil {
		return w, err
	}
	for item := range list(a[AnnotationExclude]) {
		if n, err := strconv.ParseUint(item, 10, 16); err != nil || n == 0 {
			return w, fmt.Errorf("annotation %s=%q: %q is not a port from 1 to 65535; write a comma list, for example 9092,5432", AnnotationExclude, a[AnnotationExclude], item)
		}
	}
	own := map[uint16]string{bootstrap.PortAdmin: "admin", bootstrap.PortMetrics: "metrics", bootstrap.PortHealth: "health"}
	for item := range list(a[AnnotationUpstreams]) {
		u, err := bootstrap.ParseUpstream(item)
		if err != nil {
			return w, fmt.Errorf("annotation %s: %w", AnnotationUpstreams, err)
		}
		if u.Listen.Port() == 0 {
			return w, fmt.Errorf("annotation %s: %q listens on port 0, which the application could not know; write a port", AnnotationUpstreams, item)
		}
		if what, taken := own[u.Listen.Port()]; taken {
			return w, fmt.Errorf("annotation %s: %q listens on the sidecar's own %s port; choose another", AnnotationUpstreams, item, what)
		}
		w.upstreams = append(w.upstreams, u)
	}
	for item := range list(a[AnnotationInbound]) {
		in, err := bootstrap.ParseInbound(item)
		if err != nil {
			return w, fmt.Errorf("annotation %s: %w", AnnotationInbound, err)
		}
		if in.Listen.Port() == 0 {
			return w, fmt.Errorf("annotation %s: %q listens on port 0, which nobody could know; write a port", AnnotationInbound, item)
		}
		if what, taken := own[in.Listen.Port()]; taken {
			return w, fmt.Errorf("annotation %s: %q listens on the sidecar's own %s port; choose another", AnnotationInbound, item, what)
		}
		w.inbounds = append(w.inbounds, in)
	}
	for _, name := range []string{AnnotationUpstreams, AnnotationInbound} {
		if n := len(a[name]); n > maxAnnotation {
			return w, fmt.Errorf("annotation %s has %d bytes: at most %d", name, n, maxAnnotation)
		}
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
		return w, fmt.Errorf("annotations %s and %s: %w", AnnotationUpstreams, AnnotationInbound, err)
	}
	return w, nil
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
			return r, fmt.Errorf("%s=%q is not a positive quantity: write for example 100m of CPU, 64Mi of memory", where, v)
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

func warnings(pod *corev1.Pod) []string {
	var out []string
	known := []string{
		AnnotationProxy, AnnotationCPU, AnnotationMemory, AnnotationCPULimit, AnnotationMemoryLimit, AnnotationLogLevel, AnnotationMTLS,
		AnnotationUpstreams, AnnotationInbound, AnnotationExclude, AnnotationStatus, AnnotationReason, "outrigger.dev/logs",
	}
	for key := range pod.Annotations {
		if strings.HasPrefix(key, "outrigger.dev/") && !slices.Contains(known, key) {
			out = append(out, fmt.Sprintf("annotation %s is not known and has no effect", key))
		}
	}
	if pod.Annotations[AnnotationExclude] != "" {
		out = append(out, fmt.Sprintf("annotation %s has no effect: traffic is not captured, only what %s and %s name passes through the sidecar", AnnotationExclude, AnnotationUpstreams, AnnotationInbound))
	}
	if v := pod.Annotations[AnnotationMTLS]; v == bootstrap.MTLSPermissive || v == bootstrap.MTLSStrict {
		out = append(out, fmt.Sprintf("annotation %s=%s needs a certificate, which the injector does not arrange yet: give --control-plane-ca and --join-token-file in the args of a container %s; without them the sidecar does not start", AnnotationMTLS, v, ContainerName))
	}
	for _, c := range pod.Spec.Containers {
		for _, p := range c.Ports {
			switch p.ContainerPort {
			case bootstrap.PortAdmin, bootstrap.PortMetrics, bootstrap.PortHealth:
				if c.Name != ContainerName {
					out = append(out, fmt.Sprintf("container %s uses port %d, which is the sidecar's: one of them will not start", c.Name, p.ContainerPort))
				}
			}
		}
	}
	slices.Sort(out)
	return out
}

// workload is the name users know the pod by, which the control plane uses too.
func workload(pod *corev1.Pod) string { return workloads.Name(pod) }

// takeOverride removes the user's container of our name and returns it.
func takeOverride(pod *corev1.Pod) (*corev1.Container, error) {
	var found *corev1.Container
	for _, l := range []*[]corev1.Container{&pod.Spec.Containers, &pod.Spec.InitContainers} {
		for i := 0; i < len(*l); i++ {
			if !isProxy((*l)[i]) {
				continue
			}
			if found != nil {
				return nil, fmt.Errorf("container %s is in the pod twice: keep one", ContainerName)
			}
			found = &(*l)[i]
			found = found.DeepCopy()
			*l = slices.Delete(*l, i, i+1)
			i--
		}
	}
	if len(pod.Spec.Containers) == 0 {
		return nil, errors.New("the pod has no container but the sidecar's: add the application's")
	}
	return found, nil
}
