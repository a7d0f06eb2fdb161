package reporter_test

import (
	"context"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/outrigger-mesh/outrigger/control-plane/reporting"
	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/breaker"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/reporter"
)

// control is a control plane that takes reports, and the breakers of a proxy.
type control struct {
	grpc.ClientConnInterface

	mu       sync.Mutex
	reports  []reporting.Report
	at       []time.Time
	fail     error
	breakers []reporting.Breaker
}

func (c *control) Invoke(_ context.Context, method string, args, _ any, _ ...grpc.CallOption) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if method != reporting.Method {
		return status.Error(codes.Unimplemented, method)
	}
	r, err := reporting.Decode(args.(*structpb.Struct))
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	c.reports, c.at = append(c.reports, r), append(c.at, time.Now())
	return c.fail
}

func (c *control) set(fail error, breakers ...reporting.Breaker) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fail, c.breakers = fail, breakers
}

func (c *control) taken() []reporting.Report {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := c.reports
	c.reports = nil
	return out
}

func (c *control) now(time.Time) []reporting.Breaker {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.breakers)
}

func begin(t *testing.T, c *control) (*reporter.Reporter, func()) {
	t.Helper()
	r := reporter.New(reporter.Options{Node: bootstrap.Config{Namespace: "shop", Instance: "storefront-0", Workload: "storefront"}, Breakers: c.now})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { r.Beside(ctx, c) })
	return r, func() { cancel(); wg.Wait() }
}

var payments = reporting.Breaker{Policy: "shop/payments", Target: "shop/payments:80", State: reporting.Closed}

// A proxy without breakers says nothing. One that has them says so within seconds,
// a change within half a second, whatever number of them there are, and everything
// once a minute.
func TestWhatIsToldAndWhen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &control{}
		r, end := begin(t, c)
		defer end()
		time.Sleep(5 * time.Minute)
		if n := len(c.taken()); n != 0 {
			t.Fatalf("%d reports of nothing", n)
		}
		c.set(nil, payments)
		time.Sleep(5 * time.Second)
		want := reporting.Report{Node: "storefront-0.shop", Workload: "storefront", Breakers: []reporting.Breaker{payments}}
		if d := cmp.Diff([]reporting.Report{want}, c.taken()); d != "" {
			t.Fatalf("(-want +got):\n%s", d)
		}
		open := payments
		open.State = reporting.Open
		c.set(nil, open)
		at := time.Now().UTC()
		for _, to := range []string{"open", "half-open", "open"} {
			r.Changed(breaker.Evidence{ID: "br-" + to, At: at, Policy: open.Policy, Destination: open.Target, Mode: "Observe", To: to, Reason: "5 consecutive failures >= 5"})
		}
		time.Sleep(500 * time.Millisecond)
		synctest.Wait()
		change := reporting.Change{ID: "br-open", Policy: open.Policy, Target: open.Target, State: reporting.Open, Observe: true, Time: at, Reason: "5 consecutive failures >= 5"}
		want.Breakers, want.Changes = []reporting.Breaker{open}, []reporting.Change{change, change}
		if d := cmp.Diff([]reporting.Report{want}, c.taken()); d != "" {
			t.Fatalf("(-want +got):\n%s", d)
		}
		time.Sleep(time.Hour)
		if n := len(c.taken()); n < 60 || n > 75 {
			t.Errorf("%d reports in an hour", n)
		}
		c.set(nil)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		want.Breakers = nil
		if d := cmp.Diff([]reporting.Report{want}, c.taken()); d != "" {
			t.Errorf("the breaker is gone (-want +got):\n%s", d)
		}
	})
}

// A report that failed is sent again, ever more rarely; a control plane that takes
// none is left alone until there is another connection.
func TestFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &control{}
		c.set(status.Error(codes.Unavailable, "away"), payments)
		_, end := begin(t, c)
		time.Sleep(time.Minute)
		if n := len(c.taken()); n < 4 || n > 7 {
			t.Errorf("%d attempts in a minute", n)
		}
		c.set(nil, payments)
		time.Sleep(time.Minute)
		if n := len(c.taken()); n < 1 || n > 2 {
			t.Errorf("%d reports when it was back", n)
		}
		end()
		c.set(status.Error(codes.Unimplemented, "what is that"), payments)
		_, end = begin(t, c)
		time.Sleep(time.Hour)
		if n := len(c.taken()); n != 1 {
			t.Errorf("%d attempts where reports are not known", n)
		}
		end()
	})
}
