package patch

import (
	corev1 "k8s.io/api/core/v1"
)

// checkFlag tells netinit to look whether traffic is redirected, and to redirect
// nothing.
const checkFlag = "--check"

// checkUser runs the check: not root, and not the proxy, whose traffic is never
// redirected.
const checkUser = 65532

// redirect is the init container that has the pod's traffic captured. It is root
// with two capabilities, which the Pod Security levels baseline and restricted
// refuse; where a CNI plugin does the work it has no privilege at all and fits
// restricted. The exclusions concern the check too, which must not take them for
// gaps.
func redirect(s Settings, w wish) corev1.Container {
	c := corev1.Container{
		Name:                     InitName,
		Image:                    s.Image,
		ImagePullPolicy:          s.PullPolicy,
		Command:                  []string{"/netinit"},
		Resources:                w.resources,
		TerminationMessagePolicy: corev1.TerminationMessageFallbackToLogsOnError, // kubectl describe shows what failed
		SecurityContext:          unprivileged(checkUser),
	}
	if s.CNI {
		c.Args = []string{checkFlag}
	}
	for _, f := range []struct{ flag, list string }{
		{"--exclude-inbound-ports=", w.excludeInbound},
		{"--exclude-outbound-ports=", w.excludeOutbound},
		{"--exclude-outbound-cidrs=", w.excludeCIDRs},
		{"--include-outbound-cidrs=", w.includeCIDRs},
	} {
		if f.list != "" {
			c.Args = append(c.Args, f.flag+f.list)
		}
	}
	if s.CNI {
		return c
	}
	root, no := int64(0), false
	c.SecurityContext.RunAsUser, c.SecurityContext.RunAsGroup, c.SecurityContext.RunAsNonRoot = &root, &root, &no
	c.SecurityContext.Capabilities.Add = []corev1.Capability{"NET_ADMIN", "NET_RAW"}
	return c
}

// unprivileged fits the Pod Security level "restricted".
func unprivileged(user int64) *corev1.SecurityContext {
	yes, no := true, false
	return &corev1.SecurityContext{
		RunAsNonRoot:             &yes,
		RunAsUser:                &user,
		RunAsGroup:               &user,
		ReadOnlyRootFilesystem:   &yes,
		AllowPrivilegeEscalation: &no,
		Capabilities:             &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
		SeccompProfile:           &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
	}
}
