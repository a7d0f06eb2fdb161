package patch

import (
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// sidecar is our container, fit for the Pod Security level "restricted".
func sidecar(s Settings, w wish, workload string) corev1.Container {
	field := func(name, path string) corev1.EnvVar {
		return corev1.EnvVar{Name: name, ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{APIVersion: "v1", FieldPath: path}}}
	}
	args := []string{
		"--namespace=$(POD_NAMESPACE)",
		"--workload=" + workload,
		"--instance=$(POD_NAME)",
		"--service-account=$(POD_SERVICE_ACCOUNT)",
		"--control-plane=" + s.ControlPlane,
		"--control-plane-ca=" + rootsDir + "/" + rootsFile,
		"--join-token-file=" + tokenDir + "/" + tokenFile,
	}
	if s.TrustDomain != "" {
		args = append(args, "--trust-domain="+s.TrustDomain)
	}
	env := []corev1.EnvVar{
		field("POD_NAME", "metadata.name"),
		field("POD_NAMESPACE", "metadata.namespace"),
		field("POD_SERVICE_ACCOUNT", "spec.serviceAccountName"),
	}
	if w.capture {
		// What is asked of callers is said by the control plane, which reads the
		// pod's annotation and its namespace's label.
		args = append(args, "--capture", "--pod-ips=$(POD_IPS)")
		env = append(env, field("POD_IPS", "status.podIPs"))
	} else if w.mtls != "" {
		args = append(args, "--mtls="+w.mtls)
	}
	args = append(args,
		// Kubelet and the collector come from outside the pod.
		"--health-address=:15021",
		"--metrics-address=:15020",
		"--state-dir="+StateDir,
		"--log-level="+w.logLevel,
	)
	for _, u := range w.upstreams {
		args = append(args, "--upstream="+u.String())
	}
	for _, in := range w.inbounds {
		args = append(args, "--inbound="+in.String())
	}
	c := corev1.Container{
		Name:            ContainerName,
		Image:           s.Image,
		ImagePullPolicy: s.PullPolicy,
		Args:            args,
		Ports: []corev1.ContainerPort{
			{Name: "proxy-metrics", ContainerPort: bootstrap.PortMetrics, Protocol: corev1.ProtocolTCP},
			{Name: "proxy-health", ContainerPort: bootstrap.PortHealth, Protocol: corev1.ProtocolTCP},
		},
		Env:       env,
		Resources: w.resources,
		VolumeMounts: []corev1.VolumeMount{
			{Name: VolumeName, MountPath: StateDir},
			{Name: tokenVolume, MountPath: tokenDir, ReadOnly: true},
			{Name: rootsVolume, MountPath: rootsDir, ReadOnly: true},
		},
		ReadinessProbe:  healthy("/ready", 5, 3),
		SecurityContext: unprivileged(UserID),
	}
	if s.NativeSidecar {
		// What follows in the pod waits until the sidecar is configured.
		c.StartupProbe = healthy("/ready", 1, startSeconds)
		return c
	}
	// Kubelet starts the next container when this hook has ended.
	c.Lifecycle = &corev1.Lifecycle{PostStart: &corev1.LifecycleHandler{Exec: &corev1.ExecAction{
		Command: []string{"/sidecar", "--wait-ready=" + strconv.Itoa(holdSeconds) + "s"},
	}}}
	switch {
	case w.completes:
		c.Args = append(c.Args, "--exit-when-alone")
	case w.capture:
		// All containers of a pod that ends are told at the same time; the
		// application still answers, and calls, for a while.
		c.Args = append(c.Args, "--drain-minimum="+strconv.Itoa(lingerSeconds)+"s")
	}
	return c
}

// healthy asks the sidecar's health port.
func healthy(path string, period, failures int32) *corev1.Probe {
	return &corev1.Probe{
		ProbeHandler:     corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: path, Port: intstr.FromInt32(bootstrap.PortHealth)}},
		PeriodSeconds:    period,
		TimeoutSeconds:   3,
		FailureThreshold: failures,
	}
}

// volumes that our containers mount. Kubelet makes the token readable for all of
// the pod's users, or for its fsGroup, in which the proxy's user is too: it makes
// it one user's only where all containers run as that one, and ours do not.
func volumes(w wish) []corev1.Volume {
	size, readable, seconds := resource.MustParse(stateSize), int32(0o644), int64(tokenSeconds)
	v := []corev1.Volume{
		{Name: VolumeName, VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{SizeLimit: &size}}},
		{Name: tokenVolume, VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
			DefaultMode: &readable,
			Sources: []corev1.VolumeProjection{{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{
				Audience: TokenAudience, ExpirationSeconds: &seconds, Path: tokenFile,
			}}},
		}}},
		{Name: rootsVolume, VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{
			LocalObjectReference: corev1.LocalObjectReference{Name: RootsConfigMap},
			Items:                []corev1.KeyToPath{{Key: rootsFile, Path: rootsFile}},
		}}},
	}
	if w.envoy {
		v[0] = corev1.Volume{Name: envoyVolume, VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{SizeLimit: &size}}}
	}
	return v
}

// merge lays the user's container over ours. Lists with a key are merged by it
// (env by name, ports by number, mounts by path, resources by name), args are
// added behind ours so that the last of a flag counts, everything else that is
// set replaces ours. The image "auto" means ours, and then our pull policy too:
// the API server has filled in one for "auto" by itself.
func merge(c, over *corev1.Container, native bool) {
	if over.Image != "" && over.Image != "auto" {
		c.Image = over.Image
		c.ImagePullPolicy = over.ImagePullPolicy
	}
	if len(over.Command) > 0 {
		c.Command = over.Command
	}
	c.Args = append(c.Args, over.Args...)
	c.EnvFrom = append(c.EnvFrom, over.EnvFrom...)
	c.Env = mergeBy(c.Env, over.Env, func(e corev1.EnvVar) string { return e.Name })
	c.Ports = mergeBy(c.Ports, over.Ports, func(p corev1.ContainerPort) int32 { return p.ContainerPort })
	c.VolumeMounts = mergeBy(c.VolumeMounts, over.VolumeMounts, func(m corev1.VolumeMount) string { return m.MountPath })
	c.VolumeDevices = append(c.VolumeDevices, over.VolumeDevices...)
	mergeResources(&c.Resources.Requests, over.Resources.Requests)
	mergeResources(&c.Resources.Limits, over.Resources.Limits)
	c.Resources.Claims = append(c.Resources.Claims, over.Resources.Claims...)
	c.ResizePolicy = append(c.ResizePolicy, over.ResizePolicy...)
	set(&c.LivenessProbe, over.LivenessProbe)
	set(&c.ReadinessProbe, over.ReadinessProbe)
	if native { // a plain container's startup probe would not hold back the others
		set(&c.StartupProbe, over.StartupProbe)
	}
	set(&c.Lifecycle, over.Lifecycle)
	if over.WorkingDir != "" {
		c.WorkingDir = over.WorkingDir
	}
	if over.TerminationMessagePath != "" {
		c.TerminationMessagePath = over.TerminationMessagePath
	}
	if over.TerminationMessagePolicy != "" {
		c.TerminationMessagePolicy = over.TerminationMessagePolicy
	}
	if o := over.SecurityContext; o != nil {
		s := c.SecurityContext
		set(&s.Capabilities, o.Capabilities)
		set(&s.Privileged, o.Privileged)
		set(&s.SELinuxOptions, o.SELinuxOptions)
		set(&s.RunAsUser, o.RunAsUser)
		set(&s.RunAsGroup, o.RunAsGroup)
		set(&s.RunAsNonRoot, o.RunAsNonRoot)
		set(&s.ReadOnlyRootFilesystem, o.ReadOnlyRootFilesystem)
		set(&s.AllowPrivilegeEscalation, o.AllowPrivilegeEscalation)
		set(&s.ProcMount, o.ProcMount)
		set(&s.SeccompProfile, o.SeccompProfile)
		set(&s.AppArmorProfile, o.AppArmorProfile)
	}
}

func set[T any](field **T, value *T) {
	if value != nil {
		*field = value
	}
}

func mergeBy[T any, K comparable](ours, theirs []T, key func(T) K) []T {
	for _, t := range theirs {
		if i := slices.IndexFunc(ours, func(o T) bool { return key(o) == key(t) }); i >= 0 {
			ours[i] = t
		} else {
			ours = append(ours, t)
		}
	}
	return ours
}

func mergeResources(ours *corev1.ResourceList, theirs corev1.ResourceList) {
	if *ours == nil && len(theirs) > 0 {
		*ours = corev1.ResourceList{}
	}
	for name, q := range theirs {
		(*ours)[name] = q
	}
}
