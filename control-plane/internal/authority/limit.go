package authority

import (
	"sync"
	"time"
)

// Limits of one caller, which is an identity at an address: a burst, for the
// many instances that a laptop starts at once, and one each second for long.
const (
	limitBurst = 64
	limitEvery = time.Second
	// maxCallers that are remembered. Those that have not called for long need
	// not be; where all have, a new one is refused.
	maxCallers = 10000
)

// limiter is a token bucket for each caller. Its zero value is ready.
type limiter struct {
	mu      sync.Mutex
	callers map[string]time.Time // when the bucket is full again
	swept   time.Time
}

func (l *limiter) allow(caller string, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	full, known := l.callers[caller]
	if !known && len(l.callers) >= maxCallers {
		if !now.After(l.swept) {
			return false // looked through for this second already
		}
		l.swept = now.Add(limitEvery)
		for c, t := range l.callers {
			if !t.After(now) {
				delete(l.callers, c)
			}
		}
		if len(l.callers) >= maxCallers {
			return false
		}
	}
	if full.Before(now) {
		full = now
	}
	full = full.Add(limitEvery)
	if full.Sub(now) > limitBurst*limitEvery {
		return false
	}
	if l.callers == nil {
		l.callers = map[string]time.Time{}
	}
	l.callers[caller] = full
	return true
}
