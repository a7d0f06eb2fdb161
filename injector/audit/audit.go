// Package audit finds the pods that should be meshed and are not, or run an old
// sidecar: for each the cause, and the command that mends it.
//
// It is pure and knows nothing that package patch does not: what a pod should
// have is what patch would give it if it were created now. It does not know where
// pods come from. The injector's metric and Events, and the command line's
// outrigger audit, are made of the same Findings.
package audit

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/outrigger-mesh/outrigger/injector/patch"
)

// Cause of a Finding.
type Cause string

// The causes. Those of Unmeshed mean that a pod which asks for a sidecar runs
// without one.
const (
	Missed      Cause = "missed"             // nobody injected it when it was created
	Later       Cause = "labelled-later"     // the label came after the pod
	HostNetwork Cause = "host-network"       // as are Skips of package patch
	PodSecurity Cause = "pod-security"       //
	Completes   Cause = "runs-to-completion" //
	Windows     Cause = "windows"            //
	Invalid     Cause = "invalid"            // a label or annotation that cannot be followed
	Outdated    Cause = "outdated"           // meshed, with another sidecar than the injector gives now
	Disabled    Cause = "disabled"           // by the pod's own label, in a namespace that is enabled
)

// Causes are all there are.
func Causes() []Cause {
	return []Cause{Missed, Later, HostNetwork, PodSecurity, Completes, Windows, Invalid, Outdated, Disabled}
}

// Unmeshed reports whether the pod should be meshed and is not.
func (c Cause) Unmeshed() bool { return c != Outdated && c != Disabled }

// Finding is what is to be said of one pod.
type Finding struct {
	Namespace string `json:"namespace"`
	Pod       string `json:"pod"`
	UID       string `json:"uid"`
	// Owner is what people know the pod by, for example deployment/web; empty
	// where nothing would create it anew.
	Owner   string `json:"owner,omitempty"`
	Cause   Cause  `json:"cause"`
	Message string `json:"message"`
	// Command mends it, where a command can.
	Command string `json:"command"`
}

// Report is what an audit found, in the order of namespaces and pods.
type Report struct {
	// Meshed pods with the sidecar that the injector gives now.
	Meshed   int       `json:"meshed"`
	Findings []Finding `json:"findings"`
}

// Sort puts the findings in their order.
func (r *Report) Sort() {
	slices.SortFunc(r.Findings, func(a, b Finding) int {
		return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Pod, b.Pod))
	})
}

// Counts of every cause, those that were not found too.
func (r *Report) Counts() map[Cause]int {
	counts := map[Cause]int{}
	for _, c := range Causes() {
		counts[c] = 0
	}
	for _, f := range r.Findings {
		counts[f.Cause]++
	}
	return counts
}

// Unmeshed is how many pods should be meshed and are not.
func (r *Report) Unmeshed() (n int) {
	for _, f := range r.Findings {
		if f.Cause.Unmeshed() {
			n++
		}
	}
	return n
}

// Add holds one pod of a namespace against the settings of the injector. Where
// their Image is empty, nobody's sidecar is old. A pod that has ended, or is about
// to, is no concern any more.
func (r *Report) Add(pod *corev1.Pod, ns *corev1.Namespace, s patch.Settings) {
	if pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed || pod.DeletionTimestamp != nil {
		return
	}
	f := Finding{Namespace: pod.Namespace, Pod: pod.Name, UID: string(pod.UID), Owner: owner(pod)}
	say := func(c Cause, message, command string) {
		f.Cause, f.Message, f.Command = c, message, command
		r.Findings = append(r.Findings, f)
	}
	if patch.Injected(pod) {
		if runs := image(pod); s.Image != "" && !sameImage(runs, s.Image) {
			say(Outdated, fmt.Sprintf("it runs %s; the injector gives %s now", runs, s.Image), restart(pod))
			return
		}
		r.Meshed++
		return
	}
	s.ControlPlane = cmp.Or(s.ControlPlane, "any:15012") // its annotations are checked beside it
	_, d := patch.Pod(pod, patch.Namespace{Name: ns.Name, Labels: ns.Labels}, s)
	switch {
	case d.Err != nil:
		say(Invalid, d.Err.Error(), edit(pod, ns, d.Err.Error()))
	case d.Skipped == patch.SkipPodSecurity:
		say(PodSecurity, d.Reason, fmt.Sprintf("kubectl label namespace %s %s=privileged --overwrite && %s", ns.Name, patch.LabelEnforce, restart(pod)))
	case d.Skipped != "":
		say(Cause(d.Skipped), d.Reason, label(pod, "disabled"))
	case d.Injected:
		cause, message := missed(pod, ns)
		say(cause, message, restart(pod))
	case pod.Labels[patch.LabelInjection] == "disabled" && ns.Labels[patch.LabelInjection] == "enabled":
		say(Disabled, d.Reason, label(pod, "enabled"))
	}
}

// missed tells apart what both a restart mends.
func missed(pod *corev1.Pod, ns *corev1.Namespace) (Cause, string) {
	if was := pod.Annotations[patch.AnnotationReason]; was != "" {
		return Missed, "it was skipped when it was created (" + was + "); now it would be injected"
	}
	meta, of := ns.ObjectMeta, "namespace "+ns.Name
	if _, own := pod.Labels[patch.LabelInjection]; own {
		meta, of = pod.ObjectMeta, "pod"
	}
	if at := labelled(meta); at.After(pod.CreationTimestamp.Time) {
		return Later, fmt.Sprintf("the label %s of the %s was set at %s, after the pod was created at %s; only new pods are injected",
			patch.LabelInjection, of, stamp(at), stamp(pod.CreationTimestamp.Time))
	}
	return Missed, fmt.Sprintf("nobody injected it when it was created at %s: the webhook was away and its failurePolicy is Ignore, or it is not registered for namespace %s", stamp(pod.CreationTimestamp.Time), ns.Name)
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// labelled is when whoever owns the label of injection last wrote to the object,
// as its managed fields say; zero where they do not.
func labelled(meta metav1.ObjectMeta) (at time.Time) {
	for _, m := range meta.ManagedFields {
		if m.Time != nil && m.FieldsV1 != nil && strings.Contains(m.FieldsV1.GetRawString(), `"f:`+patch.LabelInjection+`":`) && m.Time.After(at) {
			at = m.Time.Time
		}
	}
	return at
}

// image is that of our sidecar: beside an Envoy, the agent's.
func image(pod *corev1.Pod) (found string) {
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		if c.Name == patch.AgentName {
			return c.Image
		}
		if c.Name == patch.ContainerName {
			found = c.Image
		}
	}
	return found
}

// sameImage compares what is behind the last slash: registries are rewritten on
// the way, names, tags and digests are not.
func sameImage(a, b string) bool {
	return a[strings.LastIndexByte(a, '/')+1:] == b[strings.LastIndexByte(b, '/')+1:]
}

// owner is what created the pod and would create it anew, or what created that.
func owner(pod *corev1.Pod) string {
	for _, o := range pod.OwnerReferences {
		if o.Controller == nil || !*o.Controller {
			continue
		}
		if hash := pod.Labels["pod-template-hash"]; o.Kind == "ReplicaSet" && hash != "" && strings.HasSuffix(o.Name, "-"+hash) {
			return "deployment/" + strings.TrimSuffix(o.Name, "-"+hash)
		}
		return strings.ToLower(o.Kind) + "/" + o.Name
	}
	return ""
}

// hasTemplate reports whether kubectl can edit the pods of an owner, and roll
// them out anew.
func hasTemplate(owner string) bool {
	kind, _, _ := strings.Cut(owner, "/")
	return slices.Contains([]string{"deployment", "statefulset", "daemonset"}, kind)
}

func restart(pod *corev1.Pod) string {
	switch o := owner(pod); {
	case hasTemplate(o):
		return fmt.Sprintf("kubectl -n %s rollout restart %s", pod.Namespace, o)
	case o != "":
		return fmt.Sprintf("kubectl -n %s delete pod %s", pod.Namespace, pod.Name)
	default:
		return fmt.Sprintf("kubectl -n %s get pod %s -o yaml | kubectl replace --force -f -", pod.Namespace, pod.Name)
	}
}

// label writes the pod's own label where it stays: in the template.
func label(pod *corev1.Pod, value string) string {
	o := owner(pod)
	if hasTemplate(o) {
		return fmt.Sprintf(`kubectl -n %s patch %s -p '{"spec":{"template":{"metadata":{"labels":{"%s":"%s"}}}}}'`, pod.Namespace, o, patch.LabelInjection, value)
	}
	command := fmt.Sprintf("kubectl -n %s label pod %s %s=%s --overwrite", pod.Namespace, pod.Name, patch.LabelInjection, value)
	if value == "enabled" {
		command += " && " + restart(pod)
	}
	return command
}

// edit opens what has to be corrected.
func edit(pod *corev1.Pod, ns *corev1.Namespace, why string) string {
	o := owner(pod)
	switch {
	case strings.Contains(why, "on the namespace"):
		return fmt.Sprintf("kubectl label namespace %s %s=enabled --overwrite && %s", ns.Name, patch.LabelInjection, restart(pod))
	case o != "":
		return fmt.Sprintf("kubectl -n %s edit %s", pod.Namespace, o)
	default:
		return fmt.Sprintf("kubectl -n %s edit pod %s && %s", pod.Namespace, pod.Name, restart(pod))
	}
}
