package main

import (
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"
)

//go:embed mesh/*.yaml
var meshFiles embed.FS

// roles of the shop, in the order in which they start.
var roles = []string{"payments", "cart", "catalog", "storefront"}

// scene is everything that runs: the programs, their ports and folders.
type scene struct {
	dir, bin string

	xds, planeAdmin, collectorAdmin, exposition string
	places                                      map[string]*place // by role

	plane, collector *process
	running          []*process // in the order of their start
}

// place is a workload: its application and its sidecar.
type place struct {
	role                   string
	app                    string // address of the application
	inbound                string // where others reach it
	admin, metrics, health string
	upstreams              map[string]string // role -> address that the application calls
}

func newScene(dir, bin string) (*scene, error) {
	for _, name := range []string{"control-plane", "sidecar", "collector", "outrigger", "shop"} {
		if _, err := os.Stat(filepath.Join(bin, name)); err != nil {
			return nil, fmt.Errorf("%w: run make build first", err)
		}
	}
	s := &scene{dir: dir, bin: bin, places: map[string]*place{}}
	var p ports
	defer p.release()
	// The well-known ports where they are free, so that commands need no flags.
	s.xds, s.planeAdmin, s.collectorAdmin, s.exposition = p.prefer(15010), p.prefer(15014), p.prefer(15030), p.free()
	for _, role := range roles {
		s.places[role] = &place{role: role, app: p.free(), inbound: p.free(), admin: p.free(), metrics: p.free(), health: p.free(), upstreams: map[string]string{}}
	}
	front := s.places["storefront"]
	for _, role := range []string{"catalog", "cart", "payments"} {
		front.upstreams[role] = p.free()
	}
	if p.err != nil {
		return nil, p.err
	}
	return s, s.write()
}

// ports hands out free loopback ports, and keeps them until all are chosen so
// that none is handed out twice.
type ports struct {
	held []net.Listener
	err  error
}

func (p *ports) prefer(port int) string {
	if l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
		p.held = append(p.held, l)
		return l.Addr().String()
	}
	return p.free()
}

func (p *ports) free() string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		p.err = err
		return ""
	}
	p.held = append(p.held, l)
	return l.Addr().String()
}

func (p *ports) release() {
	for _, l := range p.held {
		_ = l.Close()
	}
}

func (s *scene) meshDir() string { return filepath.Join(s.dir, "mesh") }
func (s *scene) logDir() string  { return filepath.Join(s.dir, "pods") }

// write lays out the folder that the control plane watches and the collector's
// configuration.
func (s *scene) write() error {
	for _, d := range []string{s.meshDir(), s.logDir(), filepath.Join(s.dir, "collector"), filepath.Join(s.dir, "state")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return err
		}
	}
	err := fs.WalkDir(meshFiles, "mesh", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := meshFiles.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(s.meshDir(), filepath.Base(path)), b, 0o600)
	})
	if err != nil {
		return err
	}
	var w bytes.Buffer
	for _, role := range roles {
		_, port, _ := net.SplitHostPort(s.places[role].inbound)
		fmt.Fprintf(&w, `apiVersion: outrigger.dev/v1alpha1
kind: Workload
metadata: {name: %[1]s, namespace: shop, labels: {app: %[1]s}}
spec:
  serviceAccount: %[1]s
  endpoints: [{name: %[1]s-0, address: 127.0.0.1, ports: {http: %[2]s}}]
---
`, role, port)
	}
	if err := os.WriteFile(filepath.Join(s.meshDir(), "workloads.yaml"), w.Bytes(), 0o600); err != nil {
		return err
	}
	var c bytes.Buffer
	fmt.Fprintf(&c, "admin: %s\ndataDir: %s\nnode: laptop\ncluster: demo\n", s.collectorAdmin, filepath.Join(s.dir, "collector"))
	fmt.Fprintf(&c, "logs:\n  folder: %s\n  outputs: [local]\n", s.logDir())
	fmt.Fprintf(&c, "outputs:\n  local:\n    store: {folder: %s, retention: 24h}\n", filepath.Join(s.dir, "collector", "store"))
	fmt.Fprintf(&c, "metrics:\n  host: true\n  expose: %s\n  scrape:\n", s.exposition)
	for _, role := range roles {
		fmt.Fprintf(&c, "    - {job: sidecar, address: %q, interval: 5s, labels: {workload: %s, namespace: shop}}\n", s.places[role].metrics, role)
	}
	return os.WriteFile(s.collectorConfig(), c.Bytes(), 0o600)
}

func (s *scene) collectorConfig() string { return filepath.Join(s.dir, "collector.yaml") }
func (s *scene) storefrontURL() string {
	return "http://" + s.places["storefront"].inbound + "/checkout"
}

func (s *scene) startPlane() error {
	var err error
	s.plane, err = s.launch("outrigger-system", "control-plane", "control-plane", "control-plane",
		"--config", s.meshDir(), "--xds-address", s.xds, "--admin-address", s.planeAdmin)
	return err
}

// start brings everything up and waits until the first checkout succeeds.
func (s *scene) start(ctx context.Context) error {
	if err := s.startPlane(); err != nil {
		return err
	}
	var err error
	if s.collector, err = s.launch("outrigger-system", "collector", "collector", "collector", "--config", s.collectorConfig()); err != nil {
		return err
	}
	for _, role := range roles {
		p := s.places[role]
		args := []string{"--role", role, "--listen", p.app}
		for to, addr := range p.upstreams {
			args = append(args, "--"+to, addr)
		}
		if _, err := s.launch("shop", role+"-0", role, "shop", args...); err != nil {
			return err
		}
		args = []string{
			"--namespace", "shop", "--workload", role, "--instance", role + "-0", "--service-account", role, "--control-plane", s.xds,
			"--inbound", "http:" + p.inbound + "=" + p.app, "--admin-address", p.admin, "--metrics-address", p.metrics, "--health-address", p.health,
			"--state-dir", filepath.Join(s.dir, "state"),
		}
		for to, addr := range p.upstreams {
			args = append(args, "--upstream", to+".shop:80="+addr)
		}
		if _, err := s.launch("shop", role+"-0", "outrigger-proxy", "sidecar", args...); err != nil {
			return err
		}
	}
	waits := map[string]string{"control plane": "http://" + s.planeAdmin + "/ready", "collector": "http://" + s.collectorAdmin + "/ready"}
	for _, role := range roles {
		waits["sidecar of "+role] = "http://" + s.places[role].health + "/ready"
	}
	waits["the first checkout"] = s.storefrontURL()
	return s.awaitAll(ctx, waits, 30*time.Second)
}

// awaitAll polls until every address answers 200.
func (s *scene) awaitAll(ctx context.Context, waits map[string]string, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for len(waits) > 0 {
		for what, url := range waits {
			if text, err := fetch(ctx, url); err == nil {
				delete(waits, what)
			} else if ctx.Err() != nil {
				return fmt.Errorf("%s is not ready after %s: %w: %s", what, patience, err, text)
			}
		}
		for _, p := range s.running {
			if err := p.ended(); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
		}
	}
	return nil
}

func fetch(ctx context.Context, url string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }() // the answer has been read
	b, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errors.New(resp.Status)
	}
	return string(b), err
}

// setFailing tells payments to fail or to heal, behind the mesh's back.
func (s *scene) setFailing(ctx context.Context, failing bool) error {
	what := "heal"
	if failing {
		what = "fail"
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+s.places["payments"].app+"/demo/"+what, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// invite prints what can be tried while the demo runs.
func (s *scene) invite(w io.Writer) {
	cli := s.binary("outrigger")
	if s.collectorAdmin != "127.0.0.1:15030" {
		cli += " --collector " + s.collectorAdmin
	}
	fmt.Fprintln(w, "Try in another terminal:")
	for _, c := range []string{
		"curl -i " + s.storefrontURL(),
		cli + ` logs search 'service.name:payments AND "declined"' --since 10m`,
		cli + ` logs tail 'event.dataset:outrigger.breaker'`,
		cli + " logs audit",
		"curl http://" + s.places["storefront"].admin + "/debug/breakers",
		"curl http://" + s.planeAdmin + "/debug/proxies",
		"$EDITOR " + filepath.Join(s.meshDir(), "policies.yaml"),
	} {
		fmt.Fprintln(w, "  "+c)
	}
	fmt.Fprintln(w)
}

// stop ends everything in reverse order.
func (s *scene) stop() {
	for i := len(s.running) - 1; i >= 0; i-- {
		s.running[i].stop()
	}
}

// lastWords is what the programs that have ended on their own said last.
func (s *scene) lastWords() error {
	var b strings.Builder
	for _, p := range s.running {
		if p.ended() != nil {
			fmt.Fprintf(&b, "\n%s said:\n%s", p.name, p.tail.String())
		}
	}
	if b.Len() == 0 {
		return nil
	}
	return errors.New(b.String())
}
