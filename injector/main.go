// Command injector is the mutating webhook that puts the sidecar beside new
// pods.
//
// main knows flags and how the parts are put together; what they do is theirs.
package main

import (
	"context"
	"errors"
	"flag"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/oklog/run"

	"github.com/outrigger-mesh/outrigger/injector/internal/webhook"
	"github.com/outrigger-mesh/outrigger/injector/patch"
	"github.com/outrigger-mesh/outrigger/program"
)

func main() { program.Main("injector", execute) }

// drain is how long reviews in flight may take at the end. The API server's
// pods behind a Service learn of our end in about as long.
const drain = 10 * time.Second

type config struct {
	program.Flags
	patch.Settings
	listen, admin, certFile, keyFile string
}

func parse(args []string, stdout, stderr io.Writer) (config, error) {
	var c config
	f := flag.NewFlagSet("injector", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&c.listen, "listen", ":15017", "address of the webhook (HTTPS)")
	f.StringVar(&c.admin, "admin-address", "127.0.0.1:15024", "address of /ready and /metrics (HTTP); empty: none")
	f.StringVar(&c.certFile, "tls-cert", "", "certificate of the webhook in PEM; read again when it changes (required)")
	f.StringVar(&c.keyFile, "tls-key", "", "key of the certificate in PEM; read again when it changes (required)")
	f.StringVar(&c.Image, "image", "", "image of the sidecar (required)")
	f.StringVar((*string)(&c.PullPolicy), "image-pull-policy", "", "Always, IfNotPresent or Never; empty: Kubernetes' default")
	f.StringVar(&c.ControlPlane, "control-plane", "", "host:port of the control plane's xDS server, as sidecars reach it (required)")
	f.StringVar(&c.TrustDomain, "trust-domain", "", "SPIFFE trust domain; empty: the sidecar's default")
	f.BoolVar(&c.NativeSidecar, "native-sidecar", true, "make the sidecar an init container with restartPolicy Always (Kubernetes 1.29 or newer); false: a plain container, and pods that run to completion are skipped")
	f.StringVar(&c.LogLevel, "proxy-log-level", "info", "log level of sidecars: debug, info, warn or error")
	f.StringVar(&c.CPU, "proxy-cpu", "10m", "CPU request of sidecars; empty: none")
	f.StringVar(&c.Memory, "proxy-memory", "32Mi", "memory request of sidecars; empty: none")
	f.StringVar(&c.CPULimit, "proxy-cpu-limit", "", "CPU limit of sidecars; empty: none")
	f.StringVar(&c.MemoryLimit, "proxy-memory-limit", "", "memory limit of sidecars; empty: none")
	c.Register(f)
	if err := c.Parse(f, args, stdout); err != nil {
		return c, err
	}
	if c.certFile == "" || c.keyFile == "" {
		return c, errors.New("--tls-cert and --tls-key are required: the API server speaks to webhooks over TLS only")
	}
	return c, c.Validate()
}

func execute(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	conf, err := parse(args, stdout, stderr)
	if err != nil {
		return err
	}
	return serve(ctx, conf, stderr, func(webhook, admin net.Addr) {})
}

// serve runs until ctx ends or a server fails. bound is told the addresses once
// everything that can fail has not.
func serve(ctx context.Context, conf config, stderr io.Writer, bound func(webhook, admin net.Addr)) error {
	log := conf.Log("injector", stderr).With("event.dataset", "outrigger.injector")
	registry := program.Registry()

	handler, err := webhook.New(conf.Settings, log, registry)
	if err != nil {
		return err
	}
	cert, err := webhook.NewCertificate(conf.certFile, conf.keyFile, log, registry, time.Now)
	if err != nil {
		return err
	}
	reviews := webhook.Server(handler.Mux(), cert, log)
	reviewsAt, err := program.Listen(ctx, "--listen", conf.listen)
	if err != nil {
		return err
	}

	var group run.Group
	end, stop := context.WithCancel(ctx)
	group.Add(func() error { <-end.Done(); return nil }, func(error) { stop() })
	group.Add(func() error { return reviews.ServeTLS(reviewsAt, "", "") }, func(error) { shutdown(context.WithoutCancel(ctx), reviews, log) })
	var adminAddr net.Addr
	if conf.admin != "" {
		adminAt, err := program.Listen(ctx, "--admin-address", conf.admin)
		if err != nil {
			stop()
			return errors.Join(err, reviewsAt.Close())
		}
		adminAddr = adminAt.Addr()
		mux := http.NewServeMux()
		// Served once the webhook is bound and has its certificate: to be reachable
		// is to be ready.
		program.Operate(mux, func() error { return nil }, registry, log)
		serving, cancel := context.WithCancel(context.WithoutCancel(ctx))
		group.Add(func() error { return program.Serve(serving, adminAt, mux, log) }, func(error) { cancel() })
	}
	log.Info("serving", "server.address", reviewsAt.Addr().String(), "container.image.name", conf.Image, "outrigger.native_sidecar", conf.NativeSidecar)
	bound(reviewsAt.Addr(), adminAddr)
	err = group.Run()
	log.Info("ended")
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

func shutdown(ctx context.Context, s *http.Server, log *slog.Logger) {
	ctx, cancel := context.WithTimeout(ctx, drain)
	defer cancel()
	if err := s.Shutdown(ctx); err != nil {
		log.Warn("requests were cut off", "error.message", err.Error())
	}
}
