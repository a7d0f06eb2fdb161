package bootstrap

import (
	"encoding/json"
	"fmt"
	"strings"
)

// Kubelet has no identity, so its probes would be refused where mutual TLS is
// strict, and be counted as traffic where it is not. The injector therefore leads
// the probes of captured pods to PortHealth, and tells the sidecar in
// EnvProbes what they were.
const (
	// EnvProbes is a JSON object of Probes by path.
	EnvProbes = "OUTRIGGER_PROBES"
	// ProbePath begins the paths: /app-health/<container>/<livez, readyz or startupz>.
	ProbePath = "/app-health/"
	// MaxProbes of one pod, and MaxProbesBytes of EnvProbes.
	MaxProbes      = 128
	MaxProbesBytes = 64 << 10
)

// Probe is what kubelet would have done. One of HTTP, TCP and GRPC is set.
type Probe struct {
	HTTP *HTTPProbe `json:"http,omitempty"`
	TCP  *TCPProbe  `json:"tcp,omitempty"`
	GRPC *GRPCProbe `json:"grpc,omitempty"`
	// TimeoutSeconds of the probe, at least 1.
	TimeoutSeconds int `json:"timeoutSeconds"`
}

// HTTPProbe succeeds with a status from 200 to 399. Redirects are not followed
// and certificates not verified, as kubelet does.
type HTTPProbe struct {
	Scheme  string              `json:"scheme,omitempty"` // http or https; empty is http
	Host    string              `json:"host,omitempty"`   // of the Host header; empty is the address
	Port    uint16              `json:"port"`
	Path    string              `json:"path"`
	Headers map[string][]string `json:"headers,omitempty"`
}

// TCPProbe succeeds with a connection.
type TCPProbe struct {
	Port uint16 `json:"port"`
}

// GRPCProbe succeeds with SERVING (gRPC health checking protocol).
type GRPCProbe struct {
	Port    uint16 `json:"port"`
	Service string `json:"service,omitempty"`
}

// ParseProbes reads EnvProbes; an empty string has none.
func ParseProbes(s string) (map[string]Probe, error) {
	if s == "" {
		return nil, nil
	}
	if len(s) > MaxProbesBytes {
		return nil, fmt.Errorf("%s has %d bytes: at most %d", EnvProbes, len(s), MaxProbesBytes)
	}
	d := json.NewDecoder(strings.NewReader(s))
	d.DisallowUnknownFields()
	var out map[string]Probe
	if err := d.Decode(&out); err != nil {
		return nil, fmt.Errorf("%s: %w", EnvProbes, err)
	}
	if len(out) > MaxProbes {
		return nil, fmt.Errorf("%s has %d probes: at most %d", EnvProbes, len(out), MaxProbes)
	}
	for path, p := range out {
		kinds, port := 0, uint16(0)
		if p.HTTP != nil {
			kinds, port = kinds+1, p.HTTP.Port
		}
		if p.TCP != nil {
			kinds, port = kinds+1, p.TCP.Port
		}
		if p.GRPC != nil {
			kinds, port = kinds+1, p.GRPC.Port
		}
		if !strings.HasPrefix(path, ProbePath) || kinds != 1 || port == 0 || p.TimeoutSeconds < 1 {
			return nil, fmt.Errorf("%s: the probe %q needs a path below %s, one of http, tcp and grpc with a port, and timeoutSeconds of 1 or more", EnvProbes, path, ProbePath)
		}
	}
	return out, nil
}
