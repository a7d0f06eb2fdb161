package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/oklog/run"

	"github.com/outrigger-mesh/outrigger/atomicfile"
	"github.com/outrigger-mesh/outrigger/program"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/admin"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/mtls"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/proxy"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/sds"
)

const (
	// envoyPatience is how long Envoy's admin interface may take to say whether it is
	// ready.
	envoyPatience = time.Second
	// waitEvery is how often --wait-ready asks.
	waitEvery = 100 * time.Millisecond
)

// runAgent is the sidecar beside an Envoy: it carries nothing. It gets the
// workload's certificate and serves it by SDS, writes the Envoy's bootstrap, and
// answers kubelet for both.
func runAgent(ctx context.Context, cfg config, log *slog.Logger) error {
	cfg.SDS = cfg.sds
	boot, err := cfg.Envoy(cfg.envoyAdmin)
	if err != nil {
		return fmt.Errorf("--write-envoy-bootstrap: %w", err)
	}
	registry := program.Registry()
	who := mtls.New(mtls.Options{
		Authority: cfg.ControlPlane, TokenFile: cfg.joinToken, RootsFile: cfg.controlPlaneCA, Node: cfg.Config, Log: log, Registerer: registry,
	})
	binder := binder{ctx: ctx}
	defer binder.closeUnused()
	health := binder.bind(cfg.health, "--health-address")
	metrics := binder.bind(cfg.metrics, "--metrics-address")
	if binder.err != nil {
		return binder.err
	}
	secrets, err := sds.Listen(ctx, cfg.sds)
	if err != nil {
		return fmt.Errorf("--sds-address: %w", err)
	}
	defer func() { _ = secrets.Close() }() // closed already where it was served
	// Last: an Envoy that finds it can ask for everything that it names. It runs as
	// the same user.
	if err := atomicfile.Write(cfg.envoyBootstrap, boot, 0o600); err != nil {
		return fmt.Errorf("--write-envoy-bootstrap: %w", err)
	}

	own := func() error {
		select {
		case <-who.Ready():
			return nil
		default:
			return fmt.Errorf("waiting for a certificate from the authority at %s", cfg.ControlPlane)
		}
	}
	client := &http.Client{Timeout: envoyPatience, Transport: &http.Transport{DisableKeepAlives: true}}
	operators := &admin.Server{Metrics: registry, Log: log, Ready: func() error {
		if err := own(); err != nil {
			return err
		}
		return envoyReady(ctx, client, cfg.envoyAdmin)
	}}
	if len(cfg.probes) > 0 {
		at := cfg.Addresses[0]
		operators.Probes = admin.NewProbes(cfg.probes, at, proxy.SourceFor(at))
	}
	mux := http.NewServeMux()
	mux.Handle("/", operators.Health())
	mux.HandleFunc("GET /agent-ready", func(w http.ResponseWriter, _ *http.Request) {
		if err := own(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		_, _ = io.WriteString(w, "ready\n")
	})

	var g run.Group
	actor := func(f func(context.Context) error) {
		actx, cancel := context.WithCancel(ctx)
		g.Add(func() error { return f(actx) }, func(error) { cancel() })
	}
	actor(func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
	actor(who.Run)
	actor(func(ctx context.Context) error { return sds.Serve(ctx, secrets, who, log) })
	for l, h := range map[*net.TCPListener]http.Handler{health: mux, metrics: operators.Scrape()} {
		if l != nil {
			actor(func(ctx context.Context) error { return program.Serve(ctx, l, h, log) })
		}
	}
	log.Info("agent of an Envoy started", "service.version", program.Version(), "control_plane", cfg.ControlPlane, "file.path", cfg.envoyBootstrap)
	return g.Run()
}

// envoyReady asks Envoy's admin interface.
func envoyReady(ctx context.Context, client *http.Client, address string) error {
	status, err := get(ctx, client, "http://"+address+"/ready")
	switch {
	case err != nil:
		return fmt.Errorf("envoy does not answer yet: %w", err)
	case status != http.StatusOK:
		return fmt.Errorf("envoy is not ready: its admin interface says %d", status)
	}
	return nil
}

func get(ctx context.Context, client *http.Client, url string) (status int, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, err
	}
	return resp.StatusCode, resp.Body.Close()
}

// waitReady returns when the sidecar whose health address this is says that it is
// ready: what a container's postStart hook calls in a pod whose next containers
// must not start before.
func waitReady(ctx context.Context, address string, atMost time.Duration) error {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return fmt.Errorf("--health-address %q is not host:port: %w", address, err)
	}
	if ip := net.ParseIP(host); ip == nil || ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	ctx, cancel := context.WithTimeout(ctx, atMost)
	defer cancel()
	client := &http.Client{Timeout: envoyPatience, Transport: &http.Transport{DisableKeepAlives: true}}
	tick := time.NewTicker(waitEvery)
	defer tick.Stop()
	for {
		status, err := get(ctx, client, "http://"+net.JoinHostPort(host, port)+"/ready")
		if err == nil && status == http.StatusOK {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			if err == nil {
				err = fmt.Errorf("it answers %d", status)
			}
			return fmt.Errorf("--wait-ready: the sidecar at %s is not ready within %s: %w", address, atMost, err)
		}
	}
}
