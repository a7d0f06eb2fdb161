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
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	workloads "github.com/outrigger-mesh/outrigger/control-plane/identity/workload"
	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// Labels and annotations that users write.
const (
	// LabelInjection on a namespace or, with precedence, on a pod: enabled or disabled.
	LabelInjection = "outrigger.dev/injection"

	AnnotationProxy       = "outrigger.dev/proxy"              // outrigger or envoy
	AnnotationCPU         = "outrigger.dev/proxy-cpu"          // request, for example 50m
	AnnotationMemory      = "outrigger.dev/proxy-memory"       // request, for example 64Mi
	AnnotationCPULimit    = "outrigger.dev/proxy-cpu-limit"    // limit
	AnnotationMemoryLimit = "outrigger.dev/proxy-memory-limit" // limit
	AnnotationLogLevel    = "outrigger.dev/log-level"          // debug, info, warn or error
	AnnotationMTLS        = "outrigger.dev/mtls"               // off, permissive or strict: mutual TLS of those who call the pod
	AnnotationUpstreams   = "outrigger.dev/upstreams"          // comma list of payments.shop:80=127.0.0.1:4001
	AnnotationInbound     = "outrigger.dev/inbound"            // comma list of http:0.0.0.0:5001=127.0.0.1:8080

	AnnotationCapture              = "outrigger.dev/capture"                // true, or false: ambassador ports only
	AnnotationExcludeInboundPorts  = "outrigger.dev/exclude-inbound-ports"  // comma list of the pod's ports that are not captured
	AnnotationExcludeOutboundPorts = "outrigger.dev/exclude-outbound-ports" // comma list of destination ports
	AnnotationExcludeOutboundCIDRs = "outrigger.dev/exclude-outbound-cidrs" // comma list of destinations, for example 10.0.0.0/8
	AnnotationIncludeOutboundCIDRs = "outrigger.dev/include-outbound-cidrs" // comma list: nothing else is captured
)

// Annotations that the injector writes.
const (
	AnnotationStatus = "outrigger.dev/status" // StatusInjected or StatusSkipped
	AnnotationReason = "outrigger.dev/reason" // why it was skipped
	StatusInjected   = "injected"
	StatusSkipped    = "skipped"
)

// LabelEnforce on a namespace is the level of Pod Security that its pods have to
// keep: privileged, baseline or restricted.
const LabelEnforce = "pod-security.kubernetes.io/enforce"

// SystemNamespace holds the mesh's own programs.
const SystemNamespace = "outrigger-system"

// Names inside the pod.
const (
	// ContainerName of the proxy. A container of this name in the user's pod is
	// merged over ours.
	ContainerName = "outrigger-proxy"
	// InitName of the init container that redirects the pod's traffic or, where a
	// CNI plugin has done so, looks whether it is redirected.
	InitName = "outrigger-init"
	// AgentName of the sidecar beside an Envoy: its certificate, probes and health.
	AgentName = "outrigger-agent"

	VolumeName = "outrigger-state"
	StateDir   = "/var/lib/outrigger"
	// UserID of the proxy, and its group. What it sends is not captured.
	UserID = 1337

	// The token that proves the workload to the authority, and the roots by which
	// the control plane proves itself.
	tokenVolume, tokenDir, tokenFile = "outrigger-token", "/var/run/secrets/outrigger", "token" //nolint:gosec // names, no credentials
	rootsVolume, rootsDir, rootsFile = "outrigger-roots", "/etc/outrigger/roots", "root.crt"
	// RootsConfigMap is in every namespace with meshed pods.
	RootsConfigMap = "outrigger-roots"
	// TokenAudience of the projected token.
	TokenAudience = "outrigger"
	tokenSeconds  = 3600
)

// Limits of what a pod may ask for.
const (
	maxList       = 64 << 10 // bytes of the annotations upstreams and inbound
	maxAnnotation = 4 << 10  // bytes of any other annotation of ours
	maxExclusions = 64       // items of a list of ports or CIDRs
	stateSize     = "64Mi"
	// startSeconds is how long a native sidecar may wait for its first
	// configuration before kubelet restarts it.
	startSeconds = 600
	// holdSeconds is how long a plain sidecar container holds back the containers
	// behind it.
	holdSeconds = 120
	// lingerSeconds is how long a plain sidecar container goes on when the pod
	// ends; the sidecar drains for 10 s at most.
	lingerSeconds = 5
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
	// (Kubernetes 1.29). Without it the sidecar is a plain container that ends when
	// the pod's other containers have run to completion, which takes a process
	// namespace that they share.
	NativeSidecar bool
	// CNI: a plugin on the node redirects the traffic, so pods need no privilege.
	CNI bool
	// EnvoyImage for pods that ask for an Envoy; they are refused where it is empty.
	EnvoyImage string
	LogLevel   string // info where empty
	// Resources where the pod's annotations do not say; none where empty.
	CPU, Memory, CPULimit, MemoryLimit string
}

// Validate names the first setting that cannot be right, its value and the remedy.
func (s Settings) Validate() error {
	if s.Image == "" || strings.ContainsAny(s.Image, " \t\n") {
		return fmt.Errorf("image %q is not an image reference: name the sidecar's image", s.Image)
	}
	if strings.ContainsAny(s.EnvoyImage, " \t\n") {
		return fmt.Errorf("envoy image %q is not an image reference: name Envoy's image, or nothing", s.EnvoyImage)
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
	// Skipped says why a pod that asks for it is not injected; empty where it is,
	// does not ask, or is refused.
	Skipped Skip
	// Warnings of things that have no effect.
	Warnings []string
	// Err is set where the pod asks for something that cannot be given. It must
	// be refused: running it without the sidecar is not what it asks for.
	Err error
}

// Skip is why a pod cannot have a proxy.
type Skip string

// The causes of a Skip.
const (
	SkipWindows     Skip = "windows"
	SkipHostNetwork Skip = "host-network"
	SkipPodSecurity Skip = "pod-security"       // the namespace's level refuses the redirection
	SkipCompletes   Skip = "runs-to-completion" // and a plain sidecar could not notice
)

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
		return pod.DeepCopy(), Decision{Reason: err.Error(), Err: err}
	}
	// skip is for pods that asked and cannot be helped.
	skip := func(cause Skip, reason string) (*corev1.Pod, Decision) {
		annotate(out, AnnotationStatus, StatusSkipped)
		annotate(out, AnnotationReason, reason)
		return out, Decision{Reason: reason, Skipped: cause, Warnings: []string{"the pod runs without the sidecar: " + reason}}
	}

	switch ns.Name {
	case "kube-system", "kube-public", "kube-node-lease":
		return no("namespace %s belongs to Kubernetes and is never injected", ns.Name)
	case SystemNamespace:
		return no("namespace %s holds the mesh's own programs and is never injected", ns.Name)
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
	if Injected(pod) {
		changes, err := again(out)
		if err != nil {
			return refuse(err)
		}
		return out, Decision{Reason: "already injected", Warnings: changes}
	}
	if cause, reason := helpless(pod, s); cause != "" {
		return skip(cause, reason)
	}
	wish, err := read(pod, ns, s, workload)
	if err != nil {
		return refuse(err)
	}
	if level := ns.Labels[LabelEnforce]; wish.capture && !s.CNI && level != "" && level != "privileged" {
		return skip(SkipPodSecurity, fmt.Sprintf("namespace %s enforces Pod Security %q, which refuses the capability NET_ADMIN that redirecting traffic takes; install the CNI plugin of the mesh, or set the label %s=privileged on the namespace, or annotate the pod %s=false and use ambassador ports",
			ns.Name, level, LabelEnforce, AnnotationCapture))
	}
	override, err := takeOverride(out)
	if err != nil {
		return refuse(err)
	}
	warn, err := build(out, s, wish, workload, override)
	if err != nil {
		return refuse(err)
	}
	annotate(out, AnnotationStatus, StatusInjected)
	delete(out.Annotations, AnnotationReason)
	return out, Decision{Injected: true, Reason: why, Warnings: warnings(pod, wish, warn)}
}

// Injected reports whether a pod has its proxy.
func Injected(pod *corev1.Pod) bool {
	return pod.Annotations[AnnotationStatus] == StatusInjected && slices.ContainsFunc(slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers), isProxy)
}

// helpless says why a pod cannot have a proxy whatever its annotations say;
// empty where it can.
func helpless(pod *corev1.Pod, s Settings) (Skip, string) {
	switch {
	case pod.Spec.OS != nil && pod.Spec.OS.Name == corev1.Windows:
		return SkipWindows, "windows: the sidecar runs on Linux only"
	case pod.Spec.HostNetwork:
		return SkipHostNetwork, "hostNetwork: the sidecar's ports would be the node's, and two such pods would collide; remove hostNetwork, or label the pod " + LabelInjection + "=disabled"
	case s.NativeSidecar || !completes(pod):
		return "", ""
	case pod.Spec.RestartPolicy == corev1.RestartPolicyOnFailure:
		return SkipCompletes, "restartPolicy OnFailure: a plain sidecar container cannot tell an application that has completed from one that will be started again; use restartPolicy Never, native sidecars (Kubernetes 1.29), or label the pod " + LabelInjection + "=disabled"
	case pod.Spec.HostPID:
		return SkipCompletes, "hostPID: it runs to completion, which a plain sidecar container notices in a process namespace of the pod only; remove hostPID, use native sidecars (Kubernetes 1.29), or label the pod " + LabelInjection + "=disabled"
	case pod.Spec.ShareProcessNamespace != nil && !*pod.Spec.ShareProcessNamespace:
		return SkipCompletes, "shareProcessNamespace is false: it runs to completion, which a plain sidecar container notices in a process namespace of the pod only; remove shareProcessNamespace, use native sidecars (Kubernetes 1.29), or label the pod " + LabelInjection + "=disabled"
	default:
		return "", ""
	}
}

// completes reports whether the pod ends when its containers have.
func completes(pod *corev1.Pod) bool {
	return pod.Spec.RestartPolicy != "" && pod.Spec.RestartPolicy != corev1.RestartPolicyAlways
}

// build puts the containers and volumes of the mesh into a pod that has none of
// them.
func build(pod *corev1.Pod, s Settings, w wish, workload string, override *corev1.Container) (warn []string, err error) {
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		if c.Name == InitName || c.Name == AgentName {
			return nil, fmt.Errorf("container %s has a name that is the injector's: rename it, or remove what an earlier injection left in the manifest", c.Name)
		}
	}
	proxy := sidecar(s, w, workload)
	told := &proxy // the one that probes are led to
	var agent *corev1.Container
	if w.envoy {
		a, e := envoy(s, w, proxy)
		proxy, agent, told = e, &a, &a
	}
	if w.capture {
		if err := usersClash(pod); err != nil {
			return nil, err
		}
		if override != nil && override.SecurityContext != nil && override.SecurityContext.RunAsUser != nil && *override.SecurityContext.RunAsUser != UserID {
			return nil, fmt.Errorf("container %s: securityContext.runAsUser is %d: what the proxy sends is told from what the application sends by user %d; remove it", ContainerName, *override.SecurityContext.RunAsUser, UserID)
		}
		probes := map[string]bootstrap.Probe{}
		warn = leadProbes(pod, probes)
		if err := tellProbes(told, probes); err != nil {
			return nil, err
		}
	}
	if override != nil {
		merge(&proxy, override, s.NativeSidecar)
	}
	if w.capture {
		pod.Spec.InitContainers = append(pod.Spec.InitContainers, redirect(s, w))
	}
	if s.NativeSidecar {
		always := corev1.ContainerRestartPolicyAlways
		if agent != nil {
			agent.RestartPolicy = &always
			pod.Spec.InitContainers = append(pod.Spec.InitContainers, *agent)
		}
		proxy.RestartPolicy = &always
		pod.Spec.InitContainers = append(pod.Spec.InitContainers, proxy)
	} else {
		if len(pod.Spec.Containers) > 0 && pod.Annotations["kubectl.kubernetes.io/default-container"] == "" {
			annotate(pod, "kubectl.kubernetes.io/default-container", pod.Spec.Containers[0].Name)
		}
		if w.completes {
			yes := true
			pod.Spec.ShareProcessNamespace = &yes
		}
		pod.Spec.Containers = append(pod.Spec.Containers, proxy)
	}
	arrange(pod)
	for _, v := range volumes(w) {
		// One of the same name is the user's word, as a container of ours is.
		if !slices.ContainsFunc(pod.Spec.Volumes, func(o corev1.Volume) bool { return o.Name == v.Name }) {
			pod.Spec.Volumes = append(pod.Spec.Volumes, v)
		}
	}
	return warn, nil
}

// arrange puts our containers where they belong, whoever has come between since.
// A native sidecar comes first, so that the user's init containers can call
// through it, and the redirection right before it: between the two nobody could
// call anyone. A plain one comes first among the containers, which kubelet starts
// in their order, and the redirection last among the init containers, which would
// call into the void behind it; a check has nothing to wait for.
func arrange(pod *corev1.Pod) {
	rank := func(c corev1.Container) int {
		switch {
		case c.Name == InitName && (slices.ContainsFunc(pod.Spec.InitContainers, isProxy) || slices.Contains(c.Args, checkFlag)):
			return 0
		case c.Name == AgentName:
			return 1
		case c.Name == ContainerName:
			return 2
		case c.Name == InitName:
			return 4
		default:
			return 3
		}
	}
	order := func(a, b corev1.Container) int { return cmp.Compare(rank(a), rank(b)) }
	slices.SortStableFunc(pod.Spec.InitContainers, order)
	slices.SortStableFunc(pod.Spec.Containers, order)
}

// again is for a pod that has been injected and comes once more, because another
// webhook has changed it since: what came in is treated as it would have been at
// first, what is ours stays as it is.
func again(pod *corev1.Pod) (warn []string, err error) {
	arrange(pod)
	if !slices.ContainsFunc(pod.Spec.InitContainers, func(c corev1.Container) bool { return c.Name == InitName }) {
		return nil, nil // it captures nothing
	}
	if err := usersClash(pod); err != nil {
		return nil, err
	}
	told := find(pod, AgentName)
	if told == nil {
		told = find(pod, ContainerName)
	}
	probes, err := toldProbes(told)
	if err != nil {
		return nil, err
	}
	warn = leadProbes(pod, probes)
	return warn, tellProbes(told, probes)
}

func find(pod *corev1.Pod, name string) *corev1.Container {
	for _, l := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		if i := slices.IndexFunc(l, func(c corev1.Container) bool { return c.Name == name }); i >= 0 {
			return &l[i]
		}
	}
	return nil
}

// ours reports whether a container is one of the mesh's.
func ours(c corev1.Container) bool {
	return c.Name == ContainerName || c.Name == InitName || c.Name == AgentName
}

// usersClash refuses an application that runs as the proxy's user: the rules of
// the redirection would take it for the proxy.
func usersClash(pod *corev1.Pod) error {
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		var user *int64
		if pod.Spec.SecurityContext != nil {
			user = pod.Spec.SecurityContext.RunAsUser
		}
		if c.SecurityContext != nil && c.SecurityContext.RunAsUser != nil {
			user = c.SecurityContext.RunAsUser
		}
		if !ours(c) && user != nil && *user == UserID {
			return fmt.Errorf("container %s runs as user %d, which is the proxy's: what it sends would not be captured; give it another runAsUser, or annotate the pod %s=false and use ambassador ports", c.Name, UserID, AnnotationCapture)
		}
	}
	return nil
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
