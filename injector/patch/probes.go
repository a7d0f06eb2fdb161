package patch

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/textproto"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// leadProbes makes the probes of the application's containers ask the sidecar,
// and adds to told what each asked before. Probes by exec do not pass the network
// and stay. The warnings name those that could not be led.
func leadProbes(pod *corev1.Pod, told map[string]bootstrap.Probe) (warn []string) {
	for _, l := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range l {
			c := &l[i]
			if ours(*c) {
				continue
			}
			for _, p := range []struct {
				name, path string
				probe      *corev1.Probe
			}{{"livenessProbe", "livez", c.LivenessProbe}, {"readinessProbe", "readyz", c.ReadinessProbe}, {"startupProbe", "startupz", c.StartupProbe}} {
				if p.probe == nil {
					continue
				}
				path := bootstrap.ProbePath + c.Name + "/" + p.path
				was, err := probeOf(p.probe, c)
				if err != nil {
					warn = append(warn, fmt.Sprintf("container %s: the %s is left to kubelet, which has no certificate: %s", c.Name, p.name, err))
				}
				if was == nil {
					continue
				}
				told[path] = *was
				p.probe.ProbeHandler = corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{
					Path: path, Port: intstr.FromInt32(bootstrap.PortHealth), Scheme: corev1.URISchemeHTTP,
				}}
			}
		}
	}
	return warn
}

// probeOf is what kubelet does for a probe, for the sidecar to do instead; nil
// where there is nothing to lead, or nothing that can be.
func probeOf(p *corev1.Probe, c *corev1.Container) (*bootstrap.Probe, error) {
	b := bootstrap.Probe{TimeoutSeconds: max(1, int(p.TimeoutSeconds))}
	elsewhere := func(host string) error {
		return fmt.Errorf("it asks host %q; remove host, and give a Host header if one is needed", clip(host))
	}
	switch {
	case p.HTTPGet != nil:
		g := p.HTTPGet
		if g.Port == intstr.FromInt32(bootstrap.PortHealth) && strings.HasPrefix(g.Path, bootstrap.ProbePath) {
			return nil, nil // led already
		}
		if g.Host != "" {
			return nil, elsewhere(g.Host)
		}
		port, err := portOf(g.Port, c)
		if err != nil {
			return nil, err
		}
		b.HTTP = &bootstrap.HTTPProbe{Port: port, Path: g.Path}
		if g.Path == "" {
			b.HTTP.Path = "/"
		}
		if g.Scheme == corev1.URISchemeHTTPS {
			b.HTTP.Scheme = "https"
		}
		for _, h := range g.HTTPHeaders { // as kubelet reads them
			key := textproto.CanonicalMIMEHeaderKey(h.Name)
			if key == "Host" {
				if b.HTTP.Host == "" {
					b.HTTP.Host = h.Value
				}
				continue
			}
			if b.HTTP.Headers == nil {
				b.HTTP.Headers = map[string][]string{}
			}
			b.HTTP.Headers[key] = append(b.HTTP.Headers[key], h.Value)
		}
	case p.TCPSocket != nil:
		if p.TCPSocket.Host != "" {
			return nil, elsewhere(p.TCPSocket.Host)
		}
		port, err := portOf(p.TCPSocket.Port, c)
		if err != nil {
			return nil, err
		}
		b.TCP = &bootstrap.TCPProbe{Port: port}
	case p.GRPC != nil:
		port, err := portOf(intstr.FromInt32(p.GRPC.Port), c)
		if err != nil {
			return nil, err
		}
		b.GRPC = &bootstrap.GRPCProbe{Port: port}
		if p.GRPC.Service != nil {
			b.GRPC.Service = *p.GRPC.Service
		}
	default:
		return nil, nil
	}
	return &b, nil
}

// portOf resolves a port as kubelet does: a name among the container's own.
func portOf(p intstr.IntOrString, c *corev1.Container) (uint16, error) {
	n := p.IntVal
	if p.Type == intstr.String {
		i := slices.IndexFunc(c.Ports, func(o corev1.ContainerPort) bool { return o.Name == p.StrVal })
		if i < 0 {
			return 0, fmt.Errorf("the container has no port named %q; add it to its ports", clip(p.StrVal))
		}
		n = c.Ports[i].ContainerPort
	}
	if n < 1 || n > 65535 {
		return 0, fmt.Errorf("port %d is not 1 to 65535", n)
	}
	return uint16(n), nil
}

// tellProbes writes them into the environment of the container that serves them.
// Kubelet expands $(NAME) there, so that a $ is written twice.
func tellProbes(c *corev1.Container, probes map[string]bootstrap.Probe) error {
	if len(probes) == 0 {
		return nil
	}
	if n := len(probes); n > bootstrap.MaxProbes {
		return fmt.Errorf("the pod has %d probes for the sidecar to serve: at most %d; make some of them exec probes", n, bootstrap.MaxProbes)
	}
	text, err := json.Marshal(probes)
	if err != nil {
		return fmt.Errorf("probes: %w", err)
	}
	if len(text) > bootstrap.MaxProbesBytes {
		return fmt.Errorf("the pod's probes have %d bytes: at most %d; shorten their headers", len(text), bootstrap.MaxProbesBytes)
	}
	value := strings.ReplaceAll(string(text), "$", "$$")
	if i := slices.IndexFunc(c.Env, isProbes); i >= 0 {
		c.Env[i] = corev1.EnvVar{Name: bootstrap.EnvProbes, Value: value}
	} else {
		c.Env = append(c.Env, corev1.EnvVar{Name: bootstrap.EnvProbes, Value: value})
	}
	return nil
}

func isProbes(e corev1.EnvVar) bool { return e.Name == bootstrap.EnvProbes }

// toldProbes reads what tellProbes wrote.
func toldProbes(c *corev1.Container) (map[string]bootstrap.Probe, error) {
	probes := map[string]bootstrap.Probe{}
	if c == nil {
		return nil, errors.New("the pod captures its traffic but has no container " + ContainerName + ": inject it anew, from the manifest as it was written")
	}
	i := slices.IndexFunc(c.Env, isProbes)
	if i < 0 {
		return probes, nil
	}
	text := strings.ReplaceAll(c.Env[i].Value, "$$", "$")
	err := json.Unmarshal([]byte(text), &probes)
	if err == nil && probes == nil {
		err = errors.New("it is null")
	}
	if err != nil {
		return nil, fmt.Errorf("container %s: the variable %s is not as the injector wrote it; leave it alone: %w", c.Name, bootstrap.EnvProbes, err)
	}
	return probes, nil
}
