package pipeline

import (
	"context"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
)

// limiter bounds how many attempts are under way, and finds out how many the
// backend bears: one more for each round in which all went well, and a third
// fewer when it was busy or away (additive increase, multiplicative decrease).
// It begins with one, so that the collectors of many nodes do not come back from an
// outage with all that they have.
type limiter struct {
	max   float64
	gauge prometheus.Gauge

	mu    sync.Mutex
	limit float64
	busy  int
	freed chan struct{} // closed and made anew when a place may be free
}

func newLimiter(most int, gauge prometheus.Gauge) *limiter {
	gauge.Set(1)
	return &limiter{max: float64(most), gauge: gauge, limit: 1, freed: make(chan struct{})}
}

// acquire waits for a place, or for the end of ctx.
func (l *limiter) acquire(ctx context.Context) bool {
	for {
		l.mu.Lock()
		if l.busy < int(l.limit) {
			l.busy++
			l.mu.Unlock()
			return true
		}
		freed := l.freed
		l.mu.Unlock()
		select {
		case <-ctx.Done():
			return false
		case <-freed:
		}
	}
}

// release gives the place back, and says how the attempt went.
func (l *limiter) release(well bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.busy--
	if well {
		l.limit = min(l.max, l.limit+1/l.limit)
	} else {
		l.limit = max(1, l.limit*2/3)
	}
	l.gauge.Set(float64(int(l.limit)))
	close(l.freed)
	l.freed = make(chan struct{})
}
