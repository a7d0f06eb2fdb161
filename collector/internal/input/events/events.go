// Package events reads the Events of a Kubernetes cluster and writes them to the
// journal as log records.
//
// A DaemonSet has no leader, and a thousand watches of all Events would cost the
// API server more than the Events are worth. So the collectors draw one by a
// Lease, and that one watches. Where it stopped is on the Lease (the
// resourceVersion up to which all is on the disk), so that whoever holds it next
// leaves nothing out that the API server still has and repeats nothing after an
// orderly end; after a crash it repeats a third of the Lease's term at most, with
// the same event.id. Where the API server has forgotten the version, Events are
// listed, and those up to the version are known to be written.
//
// The rights that it needs:
//
//	rules:
//	- apiGroups: [events.k8s.io]
//	  resources: [events]
//	  verbs: [list, watch]
//	- apiGroups: [coordination.k8s.io]   # a Role in the collector's namespace
//	  resources: [leases]
//	  verbs: [get, create, update]
package events

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/outrigger-mesh/outrigger/collector/internal/input/journal"
	"github.com/outrigger-mesh/outrigger/collector/internal/kube"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Names and defaults.
const (
	LeaseName    = "outrigger-collector-events"
	DefaultTerm  = 30 * time.Second
	annotationAt = "outrigger.dev/events-resource-version"
	// Dataset of the records.
	Dataset = "kubernetes.event"
	// maxBatch Events of a list are written at a time.
	maxBatch = 256
	// maxRetry bounds the wait for a journal that is full.
	maxRetry = 30 * time.Second
)

// Config of an Input.
type Config struct {
	API *kube.Client
	// Namespace of the Lease, where the collector runs.
	Namespace string
	// Identity of this collector: its pod's name, or the node's.
	Identity, Cluster string
	Journal           *journal.Writer
	// Term is how long the Lease lasts that is not renewed; it is renewed three times
	// as often. Default 30 s.
	Term       time.Duration
	Log        *slog.Logger
	Registerer prometheus.Registerer
}

// Input reads Events while it holds the Lease.
type Input struct {
	cfg    Config
	leader prometheus.Gauge

	mu sync.Mutex
	at string // the version up to which the Events are on the disk
}

// New returns an Input; Run runs it.
func New(cfg Config) (*Input, error) {
	switch {
	case cfg.API == nil || cfg.Journal == nil:
		return nil, errors.New("events: no API server to ask or no journal to write to")
	case cfg.Namespace == "" || cfg.Identity == "":
		return nil, errors.New("events: the namespace of the Lease or the identity is empty: give the collector's namespace and its pod's name")
	}
	cfg.Term = cmp.Or(cfg.Term, DefaultTerm)
	if cfg.Term < time.Second {
		return nil, fmt.Errorf("events: term is %s: write at least 1s", cfg.Term)
	}
	in := &Input{cfg: cfg, leader: prometheus.NewGauge(prometheus.GaugeOpts{Name: "outrigger_events_leader", Help: "1 on the one collector of the cluster that reads the Events."})}
	if cfg.Registerer != nil {
		if err := cfg.Registerer.Register(in.leader); err != nil {
			return nil, err
		}
	}
	return in, nil
}

// lease is a Lease as far as it is used. A field that is not here would be lost
// by an update; nobody else writes this Lease.
type lease struct {
	APIVersion string    `json:"apiVersion"`
	Kind       string    `json:"kind"`
	Metadata   leaseMeta `json:"metadata"`
	Spec       leaseSpec `json:"spec"`
}

type leaseMeta struct {
	Name            string            `json:"name"`
	Namespace       string            `json:"namespace"`
	ResourceVersion string            `json:"resourceVersion,omitempty"`
	Annotations     map[string]string `json:"annotations,omitempty"`
}

type leaseSpec struct {
	Holder      string `json:"holderIdentity"`
	Seconds     int    `json:"leaseDurationSeconds"`
	Acquired    string `json:"acquireTime,omitempty"`
	Renewed     string `json:"renewTime,omitempty"`
	Transitions int    `json:"leaseTransitions"`
}

const micro = "2006-01-02T15:04:05.000000Z07:00"

// Run asks for the Lease, and reads Events while it has it, until ctx ends. Then
// it gives the Lease back.
func (in *Input) Run(ctx context.Context) error {
	var seen string // the version of the Lease that another holds
	var since time.Time
	healthy := true
	for ctx.Err() == nil {
		held, err := in.acquire(ctx, &seen, &since)
		switch {
		case err != nil && ctx.Err() == nil:
			if healthy {
				in.cfg.Log.Warn("cannot ask for the Lease of the Events; trying again", "error.message", err.Error())
			}
			healthy = false
		case held != nil:
			healthy = true
			in.lead(ctx, held)
		default:
			healthy = true
		}
		pause(ctx, in.cfg.Term/3)
	}
	return nil
}

func (in *Input) request(method, name string, body any) kube.Request {
	path := "/apis/coordination.k8s.io/v1/namespaces/" + url.PathEscape(in.cfg.Namespace) + "/leases"
	if name != "" {
		path += "/" + name
	}
	return kube.Request{Method: method, Path: path, Body: body}
}

// acquire returns the Lease if it is ours now. Another's has run out when it was
// not renewed for a term by our clock; theirs may be wrong.
func (in *Input) acquire(ctx context.Context, seen *string, since *time.Time) (*lease, error) {
	var l lease
	now := time.Now()
	err := in.cfg.API.Do(ctx, in.request(http.MethodGet, LeaseName, nil), &l)
	if kube.Code(err) == http.StatusNotFound {
		l = lease{APIVersion: "coordination.k8s.io/v1", Kind: "Lease", Metadata: leaseMeta{Name: LeaseName, Namespace: in.cfg.Namespace}}
		in.take(&l, now)
		err = in.cfg.API.Do(ctx, in.request(http.MethodPost, "", l), &l)
		return held(&l, err)
	}
	if err != nil {
		return nil, err
	}
	if l.Spec.Holder != "" && l.Spec.Holder != in.cfg.Identity {
		if l.Metadata.ResourceVersion != *seen {
			*seen, *since = l.Metadata.ResourceVersion, now
		}
		if now.Sub(*since) < max(in.cfg.Term, time.Duration(l.Spec.Seconds)*time.Second) {
			return nil, nil
		}
	}
	in.take(&l, now)
	err = in.cfg.API.Do(ctx, in.request(http.MethodPut, LeaseName, l), &l)
	return held(&l, err)
}

// held: a conflict means that another was faster.
func held(l *lease, err error) (*lease, error) {
	if kube.Code(err) == http.StatusConflict {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return l, nil
}

func (in *Input) take(l *lease, now time.Time) {
	if l.Spec.Holder != in.cfg.Identity {
		l.Spec.Transitions++
		l.Spec.Acquired = now.UTC().Format(micro)
	}
	l.Spec.Holder, l.Spec.Seconds, l.Spec.Renewed = in.cfg.Identity, int(in.cfg.Term.Seconds()), now.UTC().Format(micro)
}

// lead reads Events until the Lease is lost or ctx ends.
func (in *Input) lead(ctx context.Context, l *lease) {
	in.cfg.Log.Info("this collector reads the cluster's Events", "outrigger.resource_version", l.Metadata.Annotations[annotationAt])
	in.leader.Set(1)
	defer in.leader.Set(0)
	at := l.Metadata.Annotations[annotationAt]
	in.mu.Lock()
	// In an outage the Lease may have been lost before the place was written to it.
	if in.at != "" && newer(in.at, at) {
		at = in.at
	}
	in.at = at
	in.mu.Unlock()
	watching, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = in.watch(watching, at).Run(watching) // always nil
	}()
	renewed := time.Now()
	for ctx.Err() == nil {
		pause(ctx, in.cfg.Term/3)
		if ctx.Err() != nil {
			break
		}
		err := in.renew(ctx, l, in.cfg.Identity)
		if err == nil {
			renewed = time.Now()
			continue
		}
		if kube.Code(err) == http.StatusConflict || time.Since(renewed) > in.cfg.Term*2/3 {
			in.cfg.Log.Warn("the Lease of the Events is lost; another collector reads them", "error.message", err.Error())
			break
		}
	}
	stop()
	<-done
	if ctx.Err() != nil { // so that the next one need not wait a term
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if err := in.renew(last, l, ""); err != nil {
			in.cfg.Log.Warn("the Lease of the Events is not given back; it runs out", "error.message", err.Error())
		}
	}
}

// renew writes the Lease with the place that is reached.
func (in *Input) renew(ctx context.Context, l *lease, holder string) error {
	in.mu.Lock()
	at := in.at
	in.mu.Unlock()
	next := *l
	in.take(&next, time.Now())
	next.Spec.Holder = holder
	next.Metadata.Annotations = map[string]string{}
	if at != "" {
		next.Metadata.Annotations[annotationAt] = at
	}
	ctx, cancel := context.WithTimeout(ctx, in.cfg.Term/3+time.Second)
	defer cancel()
	if err := in.cfg.API.Do(ctx, in.request(http.MethodPut, LeaseName, next), &next); err != nil {
		return err
	}
	*l = next
	return nil
}

func (in *Input) set(at string) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.at = at
}

func (in *Input) watch(ctx context.Context, at string) *kube.Watch[event] {
	var batch []*record.Record // of a list
	var failed error           // in a list; only at the end of ctx, append tries until then
	write := func() {
		if failed == nil && len(batch) > 0 {
			failed = in.append(ctx, batch)
			batch = nil
		}
	}
	return &kube.Watch[event]{
		Client: in.cfg.API, Path: "/apis/events.k8s.io/v1/events", From: at, Version: func(e *event) string { return e.Metadata.ResourceVersion }, Log: in.cfg.Log,
		Begin: func() { batch = nil },
		Listed: func(e *event) {
			if !newer(e.Metadata.ResourceVersion, at) {
				return
			}
			if batch = append(batch, in.record(e)); len(batch) >= maxBatch {
				write()
			}
		},
		End: write,
		Changed: func(t kube.Type, e *event) error {
			if failed != nil || t == kube.Deleted { // the API server forgets it
				return failed
			}
			return in.append(ctx, []*record.Record{in.record(e)})
		},
		Reached: func(version string) {
			if failed == nil {
				at = version
				in.set(at)
			}
		},
	}
}

// newer compares versions, which are numbers that grow (KEP-5504). What cannot be
// told counts as newer: rather twice than never.
func newer(version, than string) bool {
	v, err := strconv.ParseUint(version, 10, 64)
	t, err2 := strconv.ParseUint(than, 10, 64)
	return err != nil || err2 != nil || v > t
}

// append writes to the journal, and waits while that is full: the watch waits
// with it, and the API server keeps the Events for an hour.
func (in *Input) append(ctx context.Context, batch []*record.Record) error {
	wait := time.Second
	for {
		err := in.cfg.Journal.Append(ctx, batch)
		if err == nil || ctx.Err() != nil || errors.Is(err, journal.ErrClosed) {
			return err
		}
		pause(ctx, wait)
		wait = min(2*wait, maxRetry)
	}
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
