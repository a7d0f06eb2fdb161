package metadata

import (
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Limits of what is kept of a pod; Kubernetes' own bounds of a label are less.
const (
	maxLabels     = 128
	maxAnnotation = 4 << 10 // bytes of a value
	maxContainers = 64      // of each kind
)

// Labels and annotations that mean something here.
const (
	labelName         = "app.kubernetes.io/name"
	labelHash         = "pod-template-hash"
	labelRolloutHash  = "rollouts-pod-template-hash"
	annotationService = "resource.opentelemetry.io/service.name"
	annotationConfig  = "kubernetes.io/config.hash"
)

// annotations that the collector's rules read; the rest is not kept.
var annotations = []string{"outrigger.dev/", "fluentbit.io/", "co.elastic.logs", "prometheus.io/", "resource.opentelemetry.io/"}

// object is a pod or a namespace as the API writes it: the fields that are read.
type object struct {
	Metadata struct {
		Name              string            `json:"name"`
		Namespace         string            `json:"namespace"`
		UID               string            `json:"uid"`
		ResourceVersion   string            `json:"resourceVersion"`
		CreationTimestamp time.Time         `json:"creationTimestamp"`
		Labels            map[string]string `json:"labels"`
		Annotations       map[string]string `json:"annotations"`
		OwnerReferences   []struct {
			Kind       string `json:"kind"`
			Name       string `json:"name"`
			Controller bool   `json:"controller"`
		} `json:"ownerReferences"`
	} `json:"metadata"`
	Spec struct {
		NodeName            string          `json:"nodeName"`
		Containers          []specContainer `json:"containers"`
		InitContainers      []specContainer `json:"initContainers"`
		EphemeralContainers []specContainer `json:"ephemeralContainers"`
	} `json:"spec"`
	Status struct {
		PodIP                      string            `json:"podIP"`
		ContainerStatuses          []containerStatus `json:"containerStatuses"`
		InitContainerStatuses      []containerStatus `json:"initContainerStatuses"`
		EphemeralContainerStatuses []containerStatus `json:"ephemeralContainerStatuses"`
	} `json:"status"`
}

func version(o *object) string { return o.Metadata.ResourceVersion }

type specContainer struct {
	Name  string `json:"name"`
	Image string `json:"image"`
}

type containerStatus struct {
	Name         string `json:"name"`
	ContainerID  string `json:"containerID"`
	RestartCount int    `json:"restartCount"`
	LastState    struct {
		Terminated struct {
			ContainerID string `json:"containerID"`
		} `json:"terminated"`
	} `json:"lastState"`
}

// pod is what is kept of one, and written to the cache file.
type pod struct {
	UID       string `json:"uid"`
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	// Static is the UID that the kubelet's folder has where the pod is the API's
	// mirror of a file on the node.
	Static      string               `json:"static,omitempty"`
	Kind        string               `json:"kind,omitempty"`
	Workload    string               `json:"workload,omitempty"`
	Service     string               `json:"service,omitempty"` // empty: as the path says
	IP          string               `json:"ip,omitempty"`
	Labels      map[string]string    `json:"labels,omitempty"`
	Annotations map[string]string    `json:"annotations,omitempty"`
	Containers  map[string]container `json:"containers,omitempty"`
}

type container struct {
	Image   string `json:"image,omitempty"`
	Restart int    `json:"restart,omitempty"`
	ID      string `json:"id,omitempty"`   // of that restart
	Last    string `json:"last,omitempty"` // of the restart before
}

// trim makes a pod of what the API says, with copies of the few strings that stay.
func trim(o *object) *pod {
	m := &o.Metadata
	p := &pod{UID: m.UID, Namespace: m.Namespace, Name: m.Name}
	if _, err := netip.ParseAddr(o.Status.PodIP); err == nil {
		p.IP = o.Status.PodIP
	}
	p.Labels = trimLabels(m.Labels)
	for k, v := range m.Annotations {
		if len(v) <= maxAnnotation && slices.ContainsFunc(annotations, func(prefix string) bool { return strings.HasPrefix(k, prefix) }) {
			if p.Annotations == nil {
				p.Annotations = map[string]string{}
			}
			p.Annotations[k] = v
		}
	}
	if h := m.Annotations[annotationConfig]; h != "" && h != m.UID && len(h) <= 64 {
		p.Static = h
	}
	for _, owner := range m.OwnerReferences {
		if owner.Controller {
			p.Kind, p.Workload = workload(owner.Kind, owner.Name, m.Labels, m.CreationTimestamp)
			break
		}
	}
	p.Service = p.Workload
	if p.Kind == "Node" { // owns the mirrors of its static pods
		p.Kind, p.Workload, p.Service = "", "", ""
	}
	if m.Annotations[annotationConfig] != "" { // a static pod is called <name>-<node>
		p.Service = strings.TrimSuffix(p.Name, "-"+o.Spec.NodeName)
	}
	// The order of OpenTelemetry's conventions for Kubernetes: the annotation, the
	// label, the workload. app.kubernetes.io/instance, which they read before the name,
	// is left out: it names the release, and a release has many services.
	if v := m.Labels[labelName]; v != "" {
		p.Service = v
	}
	if v := p.Annotations[annotationService]; v != "" {
		p.Service = v
	}
	p.containers(o)
	return p
}

func (p *pod) containers(o *object) {
	p.Containers = map[string]container{}
	for _, list := range [][]specContainer{o.Spec.Containers, o.Spec.InitContainers, o.Spec.EphemeralContainers} {
		for _, c := range list[:min(len(list), maxContainers)] {
			p.Containers[c.Name] = container{Image: c.Image}
		}
	}
	for _, list := range [][]containerStatus{o.Status.ContainerStatuses, o.Status.InitContainerStatuses, o.Status.EphemeralContainerStatuses} {
		for _, s := range list {
			if c, ok := p.Containers[s.Name]; ok {
				c.Restart, c.ID, c.Last = s.RestartCount, bareID(s.ContainerID), bareID(s.LastState.Terminated.ContainerID)
				p.Containers[s.Name] = c
			}
		}
	}
}

// bareID cuts the runtime's name off: containerd://<id>.
func bareID(id string) string {
	if _, bare, ok := strings.Cut(id, "://"); ok {
		return bare
	}
	return id
}

func trimLabels(labels map[string]string) map[string]string {
	if len(labels) <= maxLabels {
		return labels
	}
	kept := make(map[string]string, maxLabels)
	for _, k := range slices.Sorted(maps.Keys(labels))[:maxLabels] {
		kept[k] = labels[k]
	}
	return kept
}

// workload is who made the pod, as users name it: not the ReplicaSet but the
// Deployment, not the Job but the CronJob. It is told from names alone, and only
// where they leave no doubt.
func workload(kind, name string, labels map[string]string, created time.Time) (string, string) {
	switch kind {
	case "ReplicaSet":
		for _, h := range []struct{ label, kind string }{{labelHash, "Deployment"}, {labelRolloutHash, "Rollout"}} {
			if hash := labels[h.label]; hash != "" {
				if bare, ok := strings.CutSuffix(name, "-"+hash); ok && bare != "" {
					return h.kind, bare
				}
			}
		}
	case "Job":
		// The CronJob controller calls a Job <name>-<minutes since 1970>. A number that is
		// not just before the pod's birth is somebody's own.
		i := strings.LastIndexByte(name, '-')
		if i <= 0 || len(name)-i-1 != 8 {
			break
		}
		minutes, err := strconv.ParseUint(name[i+1:], 10, 32)
		if err != nil {
			break
		}
		if late := created.Sub(time.Unix(int64(minutes)*60, 0)); !created.IsZero() && late > -2*time.Minute && late < 24*time.Hour {
			return "CronJob", name[:i]
		}
	}
	return kind, name
}

// merge keeps what an older state of the pod knew and a newer one has lost: the
// address and the container ids of a pod that has ended.
func (p *pod) merge(old *pod) {
	if p.IP == "" {
		p.IP = old.IP
	}
	if p.Static == "" {
		p.Static = old.Static
	}
	for name, c := range p.Containers {
		o, ok := old.Containers[name]
		if !ok {
			continue
		}
		if c.ID == "" && o.ID != "" && c.Restart <= o.Restart {
			c.Restart, c.ID = o.Restart, o.ID
		}
		if c.Last == "" && c.Restart == o.Restart {
			c.Last = o.Last
		}
		if c.Last == "" && c.Restart == o.Restart+1 {
			c.Last = o.ID
		}
		p.Containers[name] = c
	}
}

func (p *pod) equal(o *pod) bool {
	return p.UID == o.UID && p.Namespace == o.Namespace && p.Name == o.Name && p.Static == o.Static && p.Kind == o.Kind && p.Workload == o.Workload &&
		p.Service == o.Service && p.IP == o.IP && maps.Equal(p.Labels, o.Labels) && maps.Equal(p.Annotations, o.Annotations) && maps.Equal(p.Containers, o.Containers)
}

// describe returns what the path says with what is known added.
func (p *pod) describe(from *record.Resource, namespace map[string]string) *record.Resource {
	r := *from
	r.WorkloadKind, r.Workload, r.PodIP = p.Kind, p.Workload, p.IP
	r.Labels, r.Annotations, r.NamespaceLabels = p.Labels, p.Annotations, namespace
	if p.Service != "" {
		r.Service = p.Service
	}
	if c, ok := p.Containers[from.Container]; ok {
		r.Image = c.Image
		switch from.Restart {
		case c.Restart:
			r.ContainerID = c.ID
		case c.Restart - 1:
			r.ContainerID = c.Last
		default: // the API remembers two
		}
	}
	return &r
}
