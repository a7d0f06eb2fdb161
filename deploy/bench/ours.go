package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger/deploy/bench/load"
)

// objects is what a user would write for the service that is measured: routes,
// a breaker that acts, and where it runs.
const objects = `apiVersion: v1
kind: Service
metadata: {name: items, namespace: bench}
spec:
  selector: {app: items}
  ports: [{name: main, port: 80, targetPort: main, appProtocol: {{protocol}}}]
---
apiVersion: outrigger.dev/v1alpha1
kind: Workload
metadata: {name: items, namespace: bench, labels: {app: items}}
spec:
  serviceAccount: items
{{mtls}}
  endpoints: [{name: items-0, address: 127.0.0.1, ports: {main: {{port}}}}]
---
apiVersion: outrigger.dev/v1alpha1
kind: CircuitBreaker
metadata: {name: items, namespace: bench}
spec:
  targetRefs: [{group: "", kind: Service, name: items}]
  mode: Enforce
{{trip}}
  limits: {connections: 20000}
`

const trip = `  trip: {failureRatio: "0.5", minimumRequests: 20, window: 10s, openFor: 5s}`

const httpRoute = `---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: items, namespace: bench}
spec:
  parentRefs: [{group: "", kind: Service, name: items, port: 80}]
  rules:
    - matches: [{path: {type: PathPrefix, value: {{path}}}}]
      backendRefs: [{name: items, port: 80}]
    - matches: [{path: {type: Exact, value: /healthz}}, {path: {type: PathPrefix, value: /v2}, headers: [{name: x-canary, value: "1"}]}]
      backendRefs: [{name: items, port: 80}]
`

// launchOurs starts a control plane with these objects and one sidecar, or two
// between which is mutual TLS.
func launchOurs(ctx context.Context, w *world, s scenario, dir string) (*running, error) {
	r := &running{}
	at, err := freePorts(8)
	if err != nil {
		return r, err
	}
	xds, planeAdmin, clientAdmin, serverAdmin, inbound, xdsTLS := at[1], at[2], at[3], at[4], at[5], at[6]
	r.address = at[0]
	mesh := filepath.Join(dir, "mesh")
	if err := os.MkdirAll(mesh, 0o700); err != nil {
		return r, err
	}
	v := map[string]string{"protocol": "http", "mtls": "", "trip": trip, "path": load.HTTP1Path, "port": fmt.Sprint(w.ports[s.protocol].Port())}
	text := objects + httpRoute
	switch {
	case s.grpc():
		v["protocol"], v["path"] = "grpc", load.GRPCPath
	case !s.http():
		text = objects
		v["protocol"] = "tcp"
	case s.pair:
		v["mtls"], v["port"] = "  mtls: Strict", fmt.Sprint(inbound.Port())
	default:
	}
	if err := expand(filepath.Join(mesh, "items.yaml"), text, v); err != nil {
		return r, err
	}

	plane := filepath.Join(w.bin, "control-plane")
	authority := filepath.Join(dir, "authority")
	args := []string{"--config", mesh, "--xds-address", xds.String(), "--admin-address", planeAdmin.String()}
	if s.pair {
		if err := speaks(ctx, plane, "authority-dir"); err != nil {
			return r, err
		}
		args = append(args, "--authority-dir", authority, "--xds-tls-address", xdsTLS.String())
	}
	p, err := start(dir, "control-plane", goEnv, plane, args...)
	if err != nil {
		return r, err
	}
	r.others = append(r.others, p)
	if err := ready(ctx, r, planeAdmin); err != nil {
		return r, err
	}
	if err := noProblems(ctx, planeAdmin); err != nil {
		return r, err
	}

	sidecar := func(name, control string, admin netip.AddrPort, more ...string) error {
		args := append([]string{
			"--namespace", "bench", "--workload", name, "--service-account", name, "--control-plane", control, "--admin-address", admin.String(),
			"--metrics-address", "", "--health-address", "",
		}, more...)
		if s.pair {
			token := filepath.Join(dir, name+".token")
			text, err := output(ctx, nil, plane, "--config", mesh, "--authority-dir", authority, "--join-token", "bench/"+name)
			if err != nil {
				return err
			}
			if err := os.WriteFile(token, []byte(text), 0o600); err != nil {
				return err
			}
			args = append(args, "--control-plane-ca", filepath.Join(authority, "root.crt"), "--join-token-file", token)
		}
		err := r.run(dir, "sidecar-"+name, goEnv, filepath.Join(w.bin, "sidecar"), args...)
		r.logs = append(r.logs, filepath.Join(dir, "sidecar-"+name+".out"))
		r.admins = append(r.admins, admin.String())
		return errors.Join(err, ready(ctx, r, admin))
	}
	control := xds.String()
	if s.pair {
		control = xdsTLS.String()
		err := sidecar("items", control, serverAdmin, "--inbound", "http:"+inbound.String()+"="+w.ports[s.protocol].String(), "--mtls", "strict")
		if err != nil {
			return r, err
		}
	}
	return r, sidecar("caller", control, clientAdmin, "--upstream", "items.bench:80="+r.address.String())
}

// noProblems asks the control plane whether it takes all objects as they are:
// a route or a breaker that it refuses would make ours faster.
func noProblems(ctx context.Context, admin netip.AddrPort) error {
	text, err := fetch(ctx, "http://"+admin.String()+"/debug/problems")
	if err != nil {
		return fmt.Errorf("problems of the control plane: %w", err)
	}
	var found struct {
		Problems []struct{ Kind, Field, Message string }
	}
	if err := json.Unmarshal([]byte(text), &found); err != nil {
		return fmt.Errorf("problems of the control plane: %w", err)
	}
	if len(found.Problems) > 0 {
		return fmt.Errorf("the control plane finds problems: %+v", found.Problems)
	}
	return nil
}

// speaks reports whether a program of this build has a flag.
func speaks(ctx context.Context, program, name string) error {
	text, err := exec.CommandContext(ctx, program, "--help").CombinedOutput()
	if err != nil {
		return err
	}
	if !strings.Contains(string(text), "-"+name) {
		return not("this build of %s has no --%s", filepath.Base(program), name)
	}
	return nil
}

// ready waits until an admin interface says so.
func ready(ctx context.Context, r *running, admin netip.AddrPort) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		text, err := fetch(ctx, "http://"+admin.String()+"/ready")
		if err == nil {
			return nil
		}
		if ended := r.ended(); ended != nil {
			return ended
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w: %s", admin, err, strings.TrimSpace(text))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func fetch(ctx context.Context, url string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }() // it has been read
	b, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errors.New(resp.Status)
	}
	return string(b), err
}
