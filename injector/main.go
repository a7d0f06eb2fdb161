// Command injector is the mutating webhook that puts the sidecar beside new
// pods, and the audit that finds those which are left out.
//
// main knows flags and how the parts are put together; what they do is theirs.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/oklog/run"
	"golang.org/x/net/netutil"

	"github.com/outrigger-mesh/outrigger/injector/audit"
	"github.com/outrigger-mesh/outrigger/injector/internal/certificate"
	"github.com/outrigger-mesh/outrigger/injector/internal/webhook"
	"github.com/outrigger-mesh/outrigger/injector/patch"
	kube "github.com/outrigger-mesh/outrigger/outrigger/cluster"
	"github.com/outrigger-mesh/outrigger/program"
)

func main() { program.Main("injector", execute) }

// drain is how long reviews in flight may take at the end. The API server's
// pods behind a Service learn of our end in about as long.
const drain = 10 * time.Second

type config struct {
	program.Flags
	patch.Settings
	listen, admin, certFile, keyFile, clientCA string

	selfSigned, audit                   bool
	kubeconfig, context, namespace      string
	secret, webhookConfiguration, names string
	lifetime, auditEvery                time.Duration
}

// inCluster: something is asked of the cluster.
func (c config) inCluster() bool { return c.selfSigned || c.audit || c.kubeconfig != "" }

func (c config) plan() certificate.Plan {
	return certificate.Plan{Names: strings.Split(c.names, ","), Life: c.lifetime}
}

func parse(args []string, stdout, stderr io.Writer) (config, error) {
	var c config
	f := flag.NewFlagSet("injector", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&c.listen, "listen", ":15017", "address of the webhook (HTTPS)")
	f.StringVar(&c.admin, "admin-address", "127.0.0.1:15024", "address of /ready and /metrics (HTTP); empty: none")
	f.BoolVar(&c.selfSigned, "self-signed", false, "issue the webhook's certificate in the cluster, keep it young, and keep the caBundle of the MutatingWebhookConfiguration patched")
	f.StringVar(&c.certFile, "tls-cert", "", "certificate of the webhook in PEM; read again when it changes (required without --self-signed)")
	f.StringVar(&c.keyFile, "tls-key", "", "key of the certificate in PEM; read again when it changes (required without --self-signed)")
	f.StringVar(&c.clientCA, "client-ca", "", "authorities (PEM) of those who may call the webhook; for API servers that have a client certificate for webhooks. Empty: everybody may, and learns nothing by it")
	f.StringVar(&c.kubeconfig, "kubeconfig", "", "how the cluster is reached; empty: as the pod's ServiceAccount, or as kubectl does")
	f.StringVar(&c.context, "context", "", "context of the kubeconfig; empty: the current one")
	f.StringVar(&c.namespace, "namespace", patch.SystemNamespace, "namespace of the injector: of its Secret and Lease")
	f.StringVar(&c.secret, "certificate-secret", webhook.DefaultSecret, "Secret of the self-issued certificate, which replicas share")
	f.StringVar(&c.webhookConfiguration, "webhook-configuration", webhook.DefaultConfiguration, "MutatingWebhookConfiguration whose caBundle is kept patched")
	f.StringVar(&c.names, "certificate-names", "", "comma list of DNS names and addresses that the API server calls the webhook by; empty: outrigger-injector.<namespace>.svc")
	f.DurationVar(&c.lifetime, "certificate-lifetime", 30*24*time.Hour, "lifetime of the self-issued certificate, renewed at half of it; its authority lives four times as long")
	f.BoolVar(&c.audit, "audit", false, "look for pods that should be meshed and are not, in one replica at a time: metric outrigger_audit_pods, and Events")
	f.DurationVar(&c.auditEvery, "audit-interval", time.Minute, "time between two audits")
	f.StringVar(&c.Image, "image", "", "image of the sidecar (required)")
	f.StringVar(&c.EnvoyImage, "envoy-image", "", "image of Envoy, for pods that ask for one; empty: they are refused")
	f.StringVar((*string)(&c.PullPolicy), "image-pull-policy", "", "Always, IfNotPresent or Never; empty: Kubernetes' default")
	f.StringVar(&c.ControlPlane, "control-plane", "", "host:port of the control plane's xDS server, as sidecars reach it (required)")
	f.StringVar(&c.TrustDomain, "trust-domain", "", "SPIFFE trust domain; empty: the sidecar's default")
	f.BoolVar(&c.CNI, "cni", false, "a CNI plugin redirects the traffic of pods; the init container only looks whether it has, and needs no privilege")
	f.BoolVar(&c.NativeSidecar, "native-sidecar", true, "make the sidecar an init container with restartPolicy Always (Kubernetes 1.29 or newer); false: a plain container, which ends when the pod's others have run to completion")
	f.StringVar(&c.LogLevel, "proxy-log-level", "info", "log level of sidecars: debug, info, warn or error")
	f.StringVar(&c.CPU, "proxy-cpu", "10m", "CPU request of sidecars; empty: none")
	f.StringVar(&c.Memory, "proxy-memory", "32Mi", "memory request of sidecars; empty: none")
	f.StringVar(&c.CPULimit, "proxy-cpu-limit", "", "CPU limit of sidecars; empty: none")
	f.StringVar(&c.MemoryLimit, "proxy-memory-limit", "", "memory limit of sidecars; empty: none")
	c.Register(f)
	if err := c.Parse(f, args, stdout); err != nil {
		return c, err
	}
	if c.names == "" {
		c.names = "outrigger-injector." + c.namespace + ".svc"
	}
	switch files := c.certFile != "" || c.keyFile != ""; {
	case c.selfSigned && files:
		return c, errors.New("--self-signed issues the certificate that --tls-cert and --tls-key name: give one or the other")
	case c.selfSigned:
		if err := c.plan().Validate(); err != nil {
			return c, err
		}
	case c.certFile == "" || c.keyFile == "":
		return c, errors.New("--tls-cert and --tls-key are required, or --self-signed: the API server speaks to webhooks over TLS only")
	}
	if c.audit && c.auditEvery < time.Second {
		return c, fmt.Errorf("--audit-interval %s is too short: at least 1s", c.auditEvery)
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
	ctx, stop := context.WithCancel(ctx)
	defer stop()

	// What is asked of the cluster; each in a goroutine of its own, below.
	var asking []func(context.Context) error
	var cluster webhook.Cluster
	ready := func() error { return nil }
	var certify func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	if conf.inCluster() {
		client, err := kube.Connect(conf.kubeconfig, conf.context, "outrigger-injector")
		if err != nil {
			return err
		}
		if cluster.Namespaces, err = webhook.NewNamespaces(client); err != nil {
			return err
		}
		if cluster.Events, err = webhook.NewEvents(client, log, registry, time.Now); err != nil {
			return err
		}
		asking = append(asking, cluster.Namespaces.Run, cluster.Events.Run)
		if conf.selfSigned {
			own, err := webhook.NewSelfSigned(webhook.SelfSignedOptions{
				Client: client, Plan: conf.plan(), Namespace: conf.namespace, Secret: conf.secret, Configuration: conf.webhookConfiguration, Now: time.Now,
			}, log, registry)
			if err != nil {
				return err
			}
			asking = append(asking, own.Run)
			certify, ready = own.Get, own.Ready
		}
		if conf.audit {
			auditor, err := webhook.NewAuditor(webhook.AuditorOptions{
				Client: client, Namespace: conf.namespace, Identity: replica(), Every: conf.auditEvery,
				Look: func(ctx context.Context) (*audit.Report, error) { return kube.Audit(ctx, client, "", conf.Settings) },
			}, cluster.Events, log, registry)
			if err != nil {
				return err
			}
			asking = append(asking, auditor.Run)
		}
	}

	handler, err := webhook.New(conf.Settings, cluster, log, registry)
	if err != nil {
		return err
	}
	if !conf.selfSigned {
		files, err := webhook.NewCertificate(conf.certFile, conf.keyFile, log, registry, time.Now)
		if err != nil {
			return err
		}
		certify = files.Get
	}
	var callers *x509.CertPool
	if conf.clientCA != "" {
		if callers, err = webhook.Callers(conf.clientCA); err != nil {
			return err
		}
	}
	reviews := webhook.Server(handler.Endpoint(), certify, callers, log)
	reviewsAt, err := program.Listen(ctx, "--listen", conf.listen)
	if err != nil {
		return err
	}

	var group run.Group
	group.Add(func() error { <-ctx.Done(); return nil }, func(error) { stop() })
	group.Add(func() error {
		return reviews.ServeTLS(netutil.LimitListener(reviewsAt, webhook.MaxConnections), "", "")
	},
		func(error) { shutdown(context.WithoutCancel(ctx), reviews, log) })
	var adminAddr net.Addr
	if conf.admin != "" {
		adminAt, err := program.Listen(ctx, "--admin-address", conf.admin)
		if err != nil {
			return errors.Join(err, reviewsAt.Close())
		}
		adminAddr = adminAt.Addr()
		mux := http.NewServeMux()
		program.Operate(mux, ready, registry, log)
		serving, cancel := context.WithCancel(context.WithoutCancel(ctx))
		group.Add(func() error { return program.Serve(serving, adminAt, mux, log) }, func(error) { cancel() })
	}
	for _, ask := range asking {
		group.Add(func() error { return ask(ctx) }, func(error) { stop() })
	}
	log.Info("serving", "server.address", reviewsAt.Addr().String(), "container.image.name", conf.Image, "outrigger.native_sidecar", conf.NativeSidecar, "outrigger.cni", conf.CNI)
	bound(reviewsAt.Addr(), adminAddr)
	err = group.Run()
	log.Info("ended")
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// replica names this process among the replicas.
func replica() string {
	host, err := os.Hostname() // the pod's name
	if err != nil {
		host = "injector"
	}
	return host + "-" + strconv.Itoa(os.Getpid()) + "-" + strconv.FormatInt(time.Now().UnixNano(), 36)
}

func shutdown(ctx context.Context, s *http.Server, log *slog.Logger) {
	ctx, cancel := context.WithTimeout(ctx, drain)
	defer cancel()
	if err := s.Shutdown(ctx); err != nil {
		log.Warn("requests were cut off", "error.message", err.Error())
	}
}
