package pipeline

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/sony/gobreaker/v2"
)

// firstOpen is how long a breaker that has just opened waits for its first probe. A
// backend that restarts is back in seconds.
const firstOpen = 500 * time.Millisecond

// breaker is sony/gobreaker's for callers that would rather wait than be refused. The
// states are gobreaker's. How long it is open is ours, because gobreaker's time is one and the
// same: it begins with firstOpen and doubles with each probe that fails, up to
// Config.BreakerOpen; half of it is random. It is safe for concurrent use.
type breaker struct {
	b     *gobreaker.TwoStepCircuitBreaker[struct{}]
	most  time.Duration
	gauge func(float64)
	log   *slog.Logger

	mu      sync.Mutex // taken within gobreaker's
	state   gobreaker.State
	open    time.Duration // the last time, before the random part
	next    time.Time     // when the next attempt may be made
	changed chan struct{} // closed and made anew with each change of state
}

func newBreaker(cfg Config, log *slog.Logger, m *Metrics) *breaker {
	b := &breaker{most: cfg.BreakerOpen, gauge: m.breaker.WithLabelValues(cfg.Name).Set, log: log, changed: make(chan struct{})}
	b.b = gobreaker.NewTwoStepCircuitBreaker[struct{}](gobreaker.Settings{
		Name:          cfg.Name,
		Timeout:       1, // the shortest: who asks has waited
		ReadyToTrip:   func(c gobreaker.Counts) bool { return c.ConsecutiveFailures >= cfg.BreakerFailures },
		OnStateChange: b.change,
	})
	return b
}

func (b *breaker) change(_ string, from, to gobreaker.State) {
	b.mu.Lock()
	b.state = to
	switch to {
	case gobreaker.StateClosed:
		b.open = 0
	case gobreaker.StateOpen:
		if b.open *= 2; b.open == 0 {
			b.open = firstOpen
		}
		b.open = min(b.open, b.most)
		b.later(b.open/2 + rand.N(b.open/2+1))
	case gobreaker.StateHalfOpen:
	}
	close(b.changed)
	b.changed = make(chan struct{})
	b.mu.Unlock()
	b.gauge(float64(to))
	b.log.Info("the output's circuit breaker changed", "outrigger.breaker.from", from.String(), "outrigger.breaker.to", to.String())
}

// later makes the next attempt not sooner than in d.
func (b *breaker) later(d time.Duration) {
	if t := time.Now().Add(d); t.After(b.next) {
		b.next = t
	}
}

// hold keeps everybody from the backend for a while, whatever the state is.
func (b *breaker) hold(d time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.later(d)
}

// delay is how long nobody may make an attempt.
func (b *breaker) delay() time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	return max(0, time.Until(b.next))
}

func (b *breaker) name() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.state.String()
}

// wait returns what ends an attempt, when one may be made; nil when ctx has ended.
func (b *breaker) wait(ctx context.Context) (done func(error)) {
	for ctx.Err() == nil {
		b.mu.Lock()
		delay, changed := time.Until(b.next), b.changed
		b.mu.Unlock()
		if delay > 0 {
			pause(ctx, delay)
			continue
		}
		done, err := b.b.Allow()
		if err == nil {
			return done
		}
		// Another's probe is under way, or the clock has not moved since it failed.
		select {
		case <-ctx.Done():
		case <-changed:
		case <-time.After(b.most):
		}
	}
	return nil
}
