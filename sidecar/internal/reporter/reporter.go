// Package reporter tells the control plane of the proxy's circuit breakers: their
// states, and when and why they opened and closed.
//
// It knows when there is something to tell; the form is package reporting's, the
// breakers are package upstream's. It works beside the stream of package
// xdsclient, on the same connection: what it tells counts at the replica that the
// proxy is connected to. Nothing depends on it, so that its failures are counted
// and otherwise silent.
package reporter

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/outrigger-mesh/outrigger/control-plane/reporting"
	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/breaker"
)

const (
	// gather is how long changes are gathered; after a connection has been made, also
	// how long the control plane has to learn who is there.
	gather = 500 * time.Millisecond
	// lookEvery is how often it is looked for breakers that are new or gone.
	lookEvery = 5 * time.Second
	// How long a report that failed waits to be sent again.
	againAtFirst = time.Second
	againAtMost  = reporting.Every
	timeout      = 5 * time.Second
)

// Options of a Reporter. Node and Breakers are required.
type Options struct {
	Node bootstrap.Config
	// Breakers are those that there are, sorted.
	Breakers func(now time.Time) []reporting.Breaker
	// Registerer takes the metrics; nil registers none.
	Registerer prometheus.Registerer
}

// Reporter is made by New. It is safe for concurrent use.
type Reporter struct {
	o       Options
	wake    chan struct{}
	results *prometheus.CounterVec

	mu      sync.Mutex
	changes []reporting.Change // the last, oldest first
}

// New makes a Reporter. A Registerer that already has its metrics makes it panic.
func New(o Options) *Reporter {
	r := &Reporter{o: o, wake: make(chan struct{}, 1), results: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "outrigger_reports_total", Help: "Reports on circuit breakers to the control plane, by result: sent, failed (tried again) or unsupported (it takes none).",
	}, []string{"result"})}
	for _, result := range []string{"sent", "failed", "unsupported"} {
		r.results.WithLabelValues(result)
	}
	if o.Registerer != nil {
		o.Registerer.MustRegister(r.results)
	}
	return r
}

// Changed takes note of a change of state. It never blocks.
func (r *Reporter) Changed(v breaker.Evidence) {
	if v.To == breaker.Open.String() || v.To == breaker.Closed.String() {
		r.mu.Lock()
		r.changes = append(r.changes, reporting.Change{
			ID: v.ID, Policy: v.Policy, Target: v.Destination, State: reporting.State(v.To), Observe: v.Mode == "Observe", Time: v.At, Reason: v.Reason,
		})
		if n := len(r.changes) - reporting.MaxChanges; n > 0 {
			r.changes = slices.Delete(r.changes, 0, n)
		}
		r.mu.Unlock()
	}
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// Beside reports on a connection until ctx ends.
func (r *Reporter) Beside(ctx context.Context, conn grpc.ClientConnInterface) {
	var (
		sent    []reporting.Breaker // last, here
		anySent bool
		due     = time.Now().Add(gather)  // a report has to be sent
		repeat  = time.Now().Add(every()) // one has to be, whatever is in it
		again   time.Duration             // after the next failure
	)
	timer := time.NewTimer(gather)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.wake:
			if due.IsZero() {
				due = time.Now().Add(gather)
			}
		case <-timer.C:
			now := time.Now()
			breakers := r.o.Breakers(now)
			wanted := !due.IsZero() && !now.Before(due)
			if due.IsZero() && (!slices.Equal(breakers, sent) || !now.Before(repeat)) {
				wanted = true
			}
			if !wanted {
				break
			}
			report := r.report(breakers)
			if !anySent && len(report.Breakers) == 0 && len(report.Changes) == 0 {
				due, repeat = time.Time{}, now.Add(every())
				break // most proxies have nothing to say
			}
			err := r.send(ctx, conn, report)
			now = time.Now()
			switch {
			case err == nil:
				sent, anySent, again = breakers, true, 0
				due, repeat = time.Time{}, now.Add(every())
			case status.Code(err) == codes.Unimplemented:
				r.results.WithLabelValues("unsupported").Inc()
				<-ctx.Done() // another connection may be to another control plane
				return
			case ctx.Err() != nil:
				return
			default:
				r.results.WithLabelValues("failed").Inc()
				again = min(max(2*again, againAtFirst), againAtMost)
				due = now.Add(again)
			}
		}
		next := lookEvery
		if !due.IsZero() {
			next = max(time.Until(due), 0)
		}
		timer.Reset(next)
	}
}

// every is about reporting.Every, so that proxies that began together do not go on
// together.
func every() time.Duration {
	return reporting.Every - time.Duration(rand.Int64N(int64(reporting.Every/5)))
}

func (r *Reporter) report(breakers []reporting.Breaker) reporting.Report {
	r.mu.Lock()
	defer r.mu.Unlock()
	return reporting.Report{
		Node: r.o.Node.NodeID(), Workload: r.o.Node.Workload,
		Breakers: breakers[:min(len(breakers), reporting.MaxBreakers)], Changes: slices.Clone(r.changes),
	}
}

func (r *Reporter) send(ctx context.Context, conn grpc.ClientConnInterface, report reporting.Report) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if err := conn.Invoke(ctx, reporting.Method, report.Encode(), new(emptypb.Empty)); err != nil {
		return err
	}
	r.results.WithLabelValues("sent").Inc()
	return nil
}
