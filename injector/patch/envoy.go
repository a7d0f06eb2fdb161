package patch

import (
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

const (
	envoyVolume    = "outrigger-envoy"
	envoyDir       = "/var/run/outrigger"
	envoyBootstrap = envoyDir + "/envoy.json"
	envoySDS       = "unix://" + envoyDir + "/sds.sock"
	envoyAdmin     = "127.0.0.1:15000"
)

// envoy makes two containers of the one that our sidecar would be: the agent,
// which is the sidecar without traffic, and the Envoy. The agent gets the
// workload's certificate and serves it to the Envoy by SDS on a socket in a
// folder that both see, writes the Envoy's bootstrap there, and answers on the
// health port: for itself at /agent-ready, which Envoy's container waits for, and
// for the Envoy too at /ready.
func envoy(s Settings, w wish, sidecar corev1.Container) (agent, proxy corev1.Container) {
	agent = sidecar
	agent.Name = AgentName
	// It carries nothing and has no configuration to remember.
	agent.Args = slices.DeleteFunc(slices.Clone(agent.Args), func(arg string) bool { return strings.HasPrefix(arg, "--state-dir=") })
	agent.Args = append(agent.Args,
		"--sds-address="+envoySDS,
		"--write-envoy-bootstrap="+envoyBootstrap,
		"--envoy-admin-address="+envoyAdmin,
	)
	agent.VolumeMounts = slices.Clone(agent.VolumeMounts)
	agent.VolumeMounts[0] = corev1.VolumeMount{Name: envoyVolume, MountPath: envoyDir}
	agent.StartupProbe = healthy("/agent-ready", 1, startSeconds)
	agent.ReadinessProbe = nil // Envoy's asks for both

	proxy = corev1.Container{
		Name:            ContainerName,
		Image:           s.EnvoyImage,
		ImagePullPolicy: s.PullPolicy,
		Command:         []string{"envoy"},
		Args: []string{
			"--config-path", envoyBootstrap,
			"--log-level", w.logLevel,
			// Nobody takes over from it in the same pod, and its root is read only.
			"--disable-hot-restart",
			// A listener that was replaced lets its connections go, or they would be
			// judged by the policy of before for as long as they last.
			"--drain-time-s", "5",
			"--drain-strategy", "immediate",
		},
		Resources:       w.resources,
		VolumeMounts:    []corev1.VolumeMount{{Name: envoyVolume, MountPath: envoyDir}},
		ReadinessProbe:  healthy("/ready", 5, 3),
		StartupProbe:    healthy("/ready", 1, startSeconds),
		SecurityContext: unprivileged(UserID),
	}
	return agent, proxy
}
