package webhook

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"log/slog"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"github.com/outrigger-mesh/outrigger/injector/internal/certificate"
)

// Names that the chart gives the objects.
const (
	DefaultSecret        = "outrigger-injector-certificate"
	DefaultConfiguration = "outrigger-injector"
)

// askTimeout bounds one look at the cluster.
const askTimeout = 15 * time.Second

// conflicts is how often another replica may be first, in one look.
const conflicts = 5

// SelfSigned is a serving certificate of an authority of our own, which lives in
// a Secret that all replicas share. Run keeps it young, and the caBundle of the
// MutatingWebhookConfiguration as it has to be, whoever edits it. While the API
// server is away the certificate in use serves on. Safe for concurrent use.
type SelfSigned struct {
	client        kubernetes.Interface
	plan          certificate.Plan
	namespace     string
	secret        string
	configuration string
	log           *slog.Logger
	now           func() time.Time

	current  atomic.Pointer[certificate.State]
	expiry   prometheus.Gauge
	changes  prometheus.Counter
	repairs  prometheus.Counter
	failures prometheus.Counter
}

// SelfSignedOptions say where a SelfSigned lives.
type SelfSignedOptions struct {
	Client        kubernetes.Interface
	Plan          certificate.Plan
	Namespace     string // of the Secret
	Secret        string
	Configuration string // the MutatingWebhookConfiguration
	Now           func() time.Time
}

// NewSelfSigned registers the metrics and asks nobody yet.
func NewSelfSigned(o SelfSignedOptions, log *slog.Logger, reg prometheus.Registerer) (*SelfSigned, error) {
	if err := o.Plan.Validate(); err != nil {
		return nil, err
	}
	s := &SelfSigned{
		client: o.Client, plan: o.Plan, namespace: o.Namespace, secret: o.Secret, configuration: o.Configuration, log: log, now: o.Now,
		expiry: newExpiry(),
		changes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "outrigger_webhook_certificate_changes_total",
			Help: "Times that this replica changed the webhook's authority or certificate.",
		}),
		repairs: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "outrigger_webhook_ca_bundle_patches_total",
			Help: "Times that this replica wrote the caBundle of the MutatingWebhookConfiguration.",
		}),
		failures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "outrigger_webhook_certificate_failures_total",
			Help: "Looks at the webhook's certificate that ended with an error; the certificate in use served on.",
		}),
	}
	for _, m := range []prometheus.Collector{s.expiry, s.changes, s.repairs, s.failures} {
		if err := reg.Register(m); err != nil {
			return nil, fmt.Errorf("webhook: registering metrics: %w", err)
		}
	}
	return s, nil
}

// Get is a [tls.Config]'s GetCertificate.
func (s *SelfSigned) Get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	if state := s.current.Load(); state != nil {
		return state.Serving(), nil
	}
	return nil, s.Ready()
}

// Ready says why there is no certificate yet.
func (s *SelfSigned) Ready() error {
	if s.current.Load() == nil {
		return fmt.Errorf("there is no serving certificate yet: Secret %s/%s could be neither read nor created, see the log", s.namespace, s.secret)
	}
	return nil
}

// Run looks until ctx ends: when the Secret or the configuration changes, and at
// intervals. An error of the cluster ends nothing; it is logged, counted, and
// tried again after one second, later half a minute.
func (s *SelfSigned) Run(ctx context.Context) error {
	wake := make(chan struct{}, 1)
	stop, err := s.watch(wake)
	if err != nil {
		return err
	}
	defer stop()
	timer := time.NewTimer(0)
	defer timer.Stop()
	wait := time.Second
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-wake:
		case <-timer.C:
		}
		err := s.look(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			s.failures.Inc()
			s.log.Warn("the webhook's certificate could not be looked after; the one in use serves on", "error.message", err.Error())
			timer.Reset(wait)
			wait = min(2*wait, 30*time.Second)
		default:
			wait = time.Second
			timer.Reset(s.plan.Look())
		}
	}
}

// watch sends to wake when one of the two objects changes. Its goroutines have
// ended when stop returns.
func (s *SelfSigned) watch(wake chan<- struct{}) (stop func(), err error) {
	only := func(name string) informers.SharedInformerOption {
		return informers.WithTweakListOptions(func(o *metav1.ListOptions) {
			o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, name).String()
		})
	}
	secrets := informers.NewSharedInformerFactoryWithOptions(s.client, 0, informers.WithNamespace(s.namespace), only(s.secret))
	configurations := informers.NewSharedInformerFactoryWithOptions(s.client, 0, only(s.configuration))
	changed := func() {
		select {
		case wake <- struct{}{}:
		default:
		}
	}
	handler := cache.ResourceEventHandlerFuncs{
		AddFunc: func(any) { changed() }, UpdateFunc: func(any, any) { changed() }, DeleteFunc: func(any) { changed() },
	}
	for _, informer := range []cache.SharedIndexInformer{
		secrets.Core().V1().Secrets().Informer(), configurations.Admissionregistration().V1().MutatingWebhookConfigurations().Informer(),
	} {
		if _, err := informer.AddEventHandler(handler); err != nil {
			return nil, fmt.Errorf("watch the webhook's objects: %w", err)
		}
	}
	end := make(chan struct{})
	secrets.Start(end)
	configurations.Start(end)
	return func() {
		close(end)
		secrets.Shutdown()
		configurations.Shutdown()
	}, nil
}

// look brings the Secret, the certificate in use and the caBundle into order.
func (s *SelfSigned) look(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	for range conflicts {
		err := s.lookOnce(ctx)
		if apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err) {
			continue // another replica was first: look at what it did
		}
		return err
	}
	return fmt.Errorf("secret %s/%s changed %d times while it was looked at", s.namespace, s.secret, conflicts)
}

func (s *SelfSigned) lookOnce(ctx context.Context) error {
	secrets := s.client.CoreV1().Secrets(s.namespace)
	secret, err := secrets.Get(ctx, s.secret, metav1.GetOptions{})
	missing := apierrors.IsNotFound(err)
	if err != nil && !missing {
		return err
	}
	var state *certificate.State
	if !missing {
		if state, err = certificate.Parse(secret.Data); err != nil {
			s.log.Warn("the Secret of the webhook's certificate cannot be used and is written anew", "kubernetes.secret.name", s.secret, "error.message", err.Error())
			state = nil
		}
	}
	configuration, configErr := s.client.AdmissionregistrationV1().MutatingWebhookConfigurations().Get(ctx, s.configuration, metav1.GetOptions{})
	if configErr != nil {
		configuration = nil
	}
	published := state != nil && trusts(configuration, state.Newest())
	next, why, err := certificate.Next(state, s.plan, published, s.now())
	if err != nil {
		return err
	}
	if why != "" {
		data, err := next.Data()
		if err != nil {
			return err
		}
		if missing {
			_, err = secrets.Create(ctx, &corev1.Secret{
				ObjectMeta: metav1.ObjectMeta{Name: s.secret, Labels: map[string]string{"app.kubernetes.io/part-of": "outrigger", "app.kubernetes.io/managed-by": "outrigger-injector"}},
				Type:       corev1.SecretTypeOpaque, Data: data,
			}, metav1.CreateOptions{})
		} else {
			secret.Data = data // with the version that was read: who is second looks again
			_, err = secrets.Update(ctx, secret, metav1.UpdateOptions{})
		}
		if err != nil {
			return err
		}
		s.changes.Inc()
		s.log.Info("webhook certificate: "+why, "tls.server.not_after", next.Serving().Leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	s.current.Store(next)
	s.expiry.Set(float64(next.Serving().Leaf.NotAfter.Unix()))
	switch {
	case apierrors.IsNotFound(configErr):
		return fmt.Errorf("there is no MutatingWebhookConfiguration %s: pods are not injected until it is installed", s.configuration)
	case configErr != nil:
		return configErr
	default:
		return s.publish(ctx, configuration, next.Bundle())
	}
}

// trusts reports whether all webhooks of a configuration have a root.
func trusts(c *admissionregistrationv1.MutatingWebhookConfiguration, root []byte) bool {
	if c == nil {
		return false
	}
	for _, w := range c.Webhooks {
		if !bytes.Contains(w.ClientConfig.CABundle, root) {
			return false
		}
	}
	return true
}

// publish patches the caBundle of every webhook whose it is not, and nothing else.
func (s *SelfSigned) publish(ctx context.Context, c *admissionregistrationv1.MutatingWebhookConfiguration, bundle []byte) error {
	type operation struct {
		Op    string `json:"op"`
		Path  string `json:"path"`
		Value any    `json:"value"`
	}
	var ops []operation
	for i, w := range c.Webhooks {
		if bytes.Equal(w.ClientConfig.CABundle, bundle) {
			continue
		}
		at := "/webhooks/" + strconv.Itoa(i)
		ops = append(ops, operation{"test", at + "/name", w.Name}, operation{"add", at + "/clientConfig/caBundle", bundle})
	}
	if len(ops) == 0 {
		return nil
	}
	patch, err := json.Marshal(ops)
	if err != nil {
		return fmt.Errorf("patch of the caBundle: %w", err)
	}
	_, err = s.client.AdmissionregistrationV1().MutatingWebhookConfigurations().Patch(ctx, s.configuration, types.JSONPatchType, patch, metav1.PatchOptions{})
	if err != nil {
		return fmt.Errorf("patch the caBundle of MutatingWebhookConfiguration %s: %w", s.configuration, err)
	}
	s.repairs.Inc()
	s.log.Info("caBundle written", "outrigger.webhook_configuration", s.configuration, "outrigger.webhooks", len(ops)/2)
	return nil
}
