// Package workload names the workload that a pod belongs to.
//
// It is a contract: the injector writes the name into the proxy's command line
// and the control plane into what callers are told of an endpoint, and the two
// must agree. It knows how Kubernetes' controllers name their pods and nothing
// else. It is apart from package identity because proxies link that one.
package workload

import (
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// Unknown is the name of a pod that has no name of any kind.
const Unknown = "pod"

// Name is the name that users know the pod by: that of what owns it, or owns
// its owner, else its own. It gives the same answer before the API server has
// completed a generated name as after.
func Name(pod *corev1.Pod) string {
	name := strings.TrimRight(pod.GenerateName, "-")
	if name == "" {
		name = pod.Name
	}
	for i := range pod.OwnerReferences {
		o := &pod.OwnerReferences[i]
		if o.Controller == nil || !*o.Controller {
			continue
		}
		name = o.Name
		switch o.Kind {
		case "ReplicaSet": // of a Deployment: <name>-<pod-template-hash>
			if hash := pod.Labels["pod-template-hash"]; hash != "" {
				name = strings.TrimSuffix(name, "-"+hash)
			}
		case "Job": // of a CronJob: <name>-<minutes since 1970>
			if cut := strings.LastIndexByte(name, '-'); cut > 0 && len(name)-cut-1 >= 8 && strings.Trim(name[cut+1:], "0123456789") == "" {
				name = name[:cut]
			}
		}
	}
	if name == "" {
		name = Unknown
	}
	return name
}
