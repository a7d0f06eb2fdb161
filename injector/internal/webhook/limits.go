package webhook

import (
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/client-go/util/flowcontrol"
)

// Limits of what callers may ask for. An API server creates some hundred pods a
// second at most, over few connections.
const (
	// MaxConnections at once; more wait to be accepted.
	MaxConnections = 512
	maxInFlight    = 64   // reviews at once; more wait as long as their caller does
	ratePerCaller  = 500  // reviews a second of one address
	burstPerCaller = 1000 // beyond it they are answered 429
	maxCallers     = 1024 // addresses that are told apart
)

// limiter turns away who asks for more than an API server does, and answers for a
// handler that panics.
type limiter struct {
	next     http.Handler
	log      *slog.Logger
	slots    chan struct{}
	rejected *prometheus.CounterVec

	mu      sync.Mutex
	callers map[string]flowcontrol.RateLimiter
}

// Values of outrigger_webhook_rejected_total's label cause.
const (
	causeRate  = "rate"  // 429
	causeGone  = "gone"  // the caller left while it waited for its turn
	causePanic = "panic" // 500, a bug of ours
)

func limit(next http.Handler, log *slog.Logger, rejected *prometheus.CounterVec) *limiter {
	for _, cause := range []string{causeRate, causeGone, causePanic} {
		rejected.WithLabelValues(cause)
	}
	return &limiter{next: next, log: log, slots: make(chan struct{}, maxInFlight), rejected: rejected, callers: map[string]flowcontrol.RateLimiter{}}
}

func (l *limiter) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	defer func() {
		if v := recover(); v != nil {
			l.rejected.WithLabelValues(causePanic).Inc()
			l.log.Error("a review made the injector panic; please report it", "error.message", fmt.Sprint(v), "error.stack_trace", string(debug.Stack()))
			http.Error(w, "the injector failed", http.StatusInternalServerError)
		}
	}()
	caller, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		caller = r.RemoteAddr
	}
	if !l.of(caller).TryAccept() {
		l.rejected.WithLabelValues(causeRate).Inc()
		w.Header().Set("Retry-After", "1")
		http.Error(w, fmt.Sprintf("more than %d reviews a second from %s", ratePerCaller, caller), http.StatusTooManyRequests)
		return
	}
	select {
	case l.slots <- struct{}{}:
		defer func() { <-l.slots }()
	case <-r.Context().Done():
		l.rejected.WithLabelValues(causeGone).Inc()
		return
	}
	l.next.ServeHTTP(w, r)
}

func (l *limiter) of(caller string) flowcontrol.RateLimiter {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := l.callers[caller]
	if r == nil {
		if len(l.callers) >= maxCallers {
			clear(l.callers) // who is at its limit gets another burst
		}
		r = flowcontrol.NewTokenBucketRateLimiter(ratePerCaller, burstPerCaller)
		l.callers[caller] = r
	}
	return r
}
