package kube

import (
	"context"
	"crypto/rand"
	"fmt"
	"net/http"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	coordinationclient "k8s.io/client-go/kubernetes/typed/coordination/v1"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
)

// LeaseName is the Lease, in the namespace of the control plane, of the replica
// that writes to the objects of others.
const LeaseName = "outrigger-control-plane"

// How long a lease holds without being renewed, and what follows from it: after
// ten fifteenths the holder gives up, and every two it renews.
const (
	defaultLease = 15 * time.Second
	renewWithin  = 10.0 / 15
	renewEvery   = 2.0 / 15
)

// leader competes for the Lease.
type leader struct {
	c        *Cluster
	identity string
	lease    time.Duration
	leads    func(bool)
}

func newLeader(c *Cluster, pod string, lease time.Duration, leads func(bool)) leader {
	if lease == 0 {
		lease = defaultLease
	}
	// Two processes may have been given the same name.
	return leader{c, pod + "_" + rand.Text()[:8], lease, leads}
}

func (l leader) part(of float64) time.Duration { return time.Duration(float64(l.lease) * of) }

// run calls work each time that this replica has become the leader, with a context
// that ends when it no longer is. It returns when ctx ends, after work has, and
// gives the Lease back, so that the next leader need not wait.
func (l leader) run(ctx context.Context, work func(context.Context)) error {
	// The elector itself bounds renewals only.
	web := &http.Client{Transport: l.c.http.Transport, Timeout: l.part(renewWithin) / 2}
	leases, err := coordinationclient.NewForConfigAndClient(l.c.config, web)
	if err != nil {
		return fmt.Errorf("a client for the Lease: %w", err)
	}
	for ctx.Err() == nil {
		if err := l.term(ctx, leases, work); err != nil {
			return err
		}
	}
	return nil
}

// term lasts from candidacy to the loss of the Lease.
func (l leader) term(ctx context.Context, leases coordinationclient.LeasesGetter, work func(context.Context)) error {
	led := make(chan context.Context, 1)
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock: &tellingLock{c: l.c, Interface: &resourcelock.LeaseLock{
			LeaseMeta: metav1.ObjectMeta{Namespace: l.c.o.Namespace, Name: LeaseName}, Client: leases,
			LockConfig: resourcelock.ResourceLockConfig{Identity: l.identity},
		}},
		LeaseDuration: l.lease, RenewDeadline: l.part(renewWithin), RetryPeriod: l.part(renewEvery), ReleaseOnCancel: true, Name: LeaseName,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(ctx context.Context) { led <- ctx },
			OnStoppedLeading: func() {},
		},
	})
	if err != nil {
		return fmt.Errorf("leader election: %w", err)
	}
	// Its context ends after work has: the Lease is given back when nothing is
	// written any more.
	electing, stop := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	over := make(chan struct{})
	wg.Go(func() {
		defer close(over)
		elector.Run(electing)
	})
	select {
	case <-ctx.Done():
	case <-over:
	case held := <-led:
		l.leads(true)
		working, cancel := context.WithCancel(held)
		unhook := context.AfterFunc(ctx, cancel)
		work(working) //nolint:contextcheck // it ends with the lease and with ctx
		unhook()
		cancel()
		l.leads(false)
	}
	return nil
}

// tellingLock says in the log why there is no leader: the elector says it at a
// level that nobody sees. That the API server is away is told elsewhere.
type tellingLock struct {
	resourcelock.Interface
	c *Cluster

	mu   sync.Mutex
	said time.Time
}

func (l *tellingLock) note(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now := time.Now(); refused(err) && now.Sub(l.said) >= sayAwayEvery {
		l.said = now
		l.c.log.Warn("no leader can be elected, so that no status is written; let the control plane's Role create leases, and get and update the one of this name, in its namespace",
			"orchestrator.resource.name", LeaseName, "orchestrator.namespace", l.c.o.Namespace, "error.message", err.Error())
	}
}

// Get implements resourcelock.Interface.
func (l *tellingLock) Get(ctx context.Context) (*resourcelock.LeaderElectionRecord, []byte, error) {
	r, raw, err := l.Interface.Get(ctx)
	l.note(err)
	return r, raw, err
}

// Create implements resourcelock.Interface.
func (l *tellingLock) Create(ctx context.Context, r resourcelock.LeaderElectionRecord) error {
	err := l.Interface.Create(ctx, r)
	l.note(err)
	return err
}

// Update implements resourcelock.Interface.
func (l *tellingLock) Update(ctx context.Context, r resourcelock.LeaderElectionRecord) error {
	err := l.Interface.Update(ctx, r)
	l.note(err)
	return err
}
