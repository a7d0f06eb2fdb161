package webhook

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"

	"github.com/outrigger-mesh/outrigger/injector/audit"
)

// LeaseName of the one replica that audits.
const LeaseName = "outrigger-injector"

// Times of the Lease: another replica takes over within leaseDuration.
const (
	leaseDuration = 15 * time.Second
	renewDeadline = 10 * time.Second
	retryPeriod   = 2 * time.Second
)

// auditEvents is how many pods one audit tells of at most; the metric and the
// command line tell of all.
const auditEvents = 100

// Auditor looks again and again for pods that should be meshed and are not, in
// one replica at a time.
type Auditor struct {
	AuditorOptions
	events   *Events
	log      *slog.Logger
	pods     *prometheus.GaugeVec
	meshed   prometheus.Gauge
	last     prometheus.Gauge
	failures prometheus.Counter
}

// AuditorOptions say what is audited, and by whom.
type AuditorOptions struct {
	Client    kubernetes.Interface
	Namespace string // of the Lease
	Identity  string // of this replica
	// Every is the time between two audits.
	Every time.Duration
	// Look makes the report.
	Look func(context.Context) (*audit.Report, error)
}

// NewAuditor registers its metrics.
func NewAuditor(o AuditorOptions, events *Events, log *slog.Logger, reg prometheus.Registerer) (*Auditor, error) {
	a := &Auditor{
		AuditorOptions: o, events: events, log: log,
		pods: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "outrigger_audit_pods",
			Help: "Pods that should be meshed and are not, run an old sidecar (outdated) or are left out by their label (disabled), by cause. Of the replica that audits only.",
		}, []string{"cause"}),
		meshed: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "outrigger_audit_meshed_pods",
			Help: "Pods that are meshed with the sidecar that the injector gives now. 0 in a replica that does not audit.",
		}),
		last: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "outrigger_audit_timestamp_seconds",
			Help: "When this replica last ended an audit. 0 in a replica that does not audit.",
		}),
		failures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "outrigger_audit_failures_total",
			Help: "Audits that ended with an error of the cluster; the counts are those of the last good one.",
		}),
	}
	for _, m := range []prometheus.Collector{a.pods, a.meshed, a.last, a.failures} {
		if err := reg.Register(m); err != nil {
			return nil, fmt.Errorf("webhook: registering metrics: %w", err)
		}
	}
	return a, nil
}

// Run audits whenever this replica holds the Lease, until ctx ends.
func (a *Auditor) Run(ctx context.Context) error {
	// The elector does not wait for what it calls; so it only hands over the
	// context that ends with the Lease.
	leading := make(chan context.Context, 1)
	var audits sync.WaitGroup
	defer audits.Wait()
	audits.Go(func() {
		for {
			select {
			case lease := <-leading:
				a.audits(lease) //nolint:contextcheck // it is ctx until the Lease ends
			case <-ctx.Done():
				return
			}
		}
	})
	for ctx.Err() == nil {
		elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
			Lock: &resourcelock.LeaseLock{
				LeaseMeta: metav1.ObjectMeta{Name: LeaseName, Namespace: a.Namespace}, Client: a.Client.CoordinationV1(),
				LockConfig: resourcelock.ResourceLockConfig{Identity: a.Identity},
			},
			LeaseDuration: leaseDuration, RenewDeadline: renewDeadline, RetryPeriod: retryPeriod, ReleaseOnCancel: true, Name: LeaseName,
			Callbacks: leaderelection.LeaderCallbacks{
				OnStartedLeading: func(lease context.Context) {
					select {
					case leading <- lease:
					case <-lease.Done():
					}
				},
				OnStoppedLeading: func() {},
			},
		})
		if err != nil {
			return fmt.Errorf("audit: %w", err)
		}
		elector.Run(ctx)
	}
	return nil
}

// audits audits until ctx ends, which is when the Lease is lost too.
func (a *Auditor) audits(ctx context.Context) {
	a.log.Info("this replica audits", "outrigger.replica", a.Identity)
	defer func() {
		a.pods.Reset()
		a.meshed.Set(0)
		a.last.Set(0)
	}()
	tick := time.NewTicker(a.Every)
	defer tick.Stop()
	for {
		a.audit(ctx)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (a *Auditor) audit(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, max(a.Every, time.Minute))
	defer cancel()
	report, err := a.Look(ctx)
	if err != nil {
		if ctx.Err() == nil || errors.Is(ctx.Err(), context.DeadlineExceeded) {
			a.failures.Inc()
			a.log.Warn("pods could not be audited", "error.message", err.Error())
		}
		return
	}
	for cause, n := range report.Counts() {
		a.pods.WithLabelValues(string(cause)).Set(float64(n))
	}
	a.meshed.Set(float64(report.Meshed))
	a.last.SetToCurrentTime()
	told := 0
	for _, f := range report.Findings {
		if !f.Cause.Unmeshed() || told == auditEvents {
			continue
		}
		told++
		a.events.Tell(Event{
			About:  corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: f.Namespace, Name: f.Pod, UID: types.UID(f.UID)},
			Reason: ReasonNotMeshed, Message: string(f.Cause) + ": " + f.Message + "; mend it by: " + f.Command,
		})
	}
	if n := report.Unmeshed(); n > 0 {
		a.log.Warn("pods should be meshed and are not; outrigger audit lists them", "outrigger.audit.unmeshed", n, "outrigger.audit.meshed", report.Meshed)
	}
}
