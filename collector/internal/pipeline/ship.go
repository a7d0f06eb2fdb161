package pipeline

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sony/gobreaker/v2"

	"github.com/outrigger-mesh/outrigger/collector/internal/ledger"
	"github.com/outrigger-mesh/outrigger/collector/internal/output"
	"github.com/outrigger-mesh/outrigger/collector/internal/tail"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// maxRetryAfter bounds what a backend may ask for.
const maxRetryAfter = 5 * time.Minute

// ship makes batches and sends them until ctx ends. What it has taken and not
// settled then is read again after the restart.
func (p *Pipeline) ship(ctx context.Context) {
	for {
		batch := p.gather(ctx)
		if ctx.Err() != nil {
			return
		}
		p.send(ctx, batch)
	}
}

// gather waits for a record, and then for more until the batch is full or the
// linger is over.
func (p *Pipeline) gather(ctx context.Context) []tail.Entry {
	var batch []tail.Entry
	bytes := 0
	add := func(e tail.Entry) {
		batch = append(batch, e)
		bytes += int(cost(e))
	}
	select {
	case <-ctx.Done():
		return nil
	case e := <-p.queue:
		add(e)
	}
	linger := time.NewTimer(p.cfg.Linger)
	defer linger.Stop()
	for len(batch) < p.cfg.MaxRecords && bytes < p.cfg.MaxBytes {
		select {
		case <-ctx.Done():
			return batch
		case <-linger.C:
			return batch
		case e := <-p.queue:
			add(e)
		}
	}
	return batch
}

// send sends a batch until every record of it is settled, or ctx ends.
func (p *Pipeline) send(ctx context.Context, batch []tail.Entry) {
	failures := 0
	work := [][]tail.Entry{batch} // the last is next
	for attempt := 0; len(work) > 0; attempt++ {
		if !p.breaker.wait(ctx) {
			return
		}
		if attempt > 0 {
			p.metrics.retries.WithLabelValues(p.cfg.Name).Inc()
		}
		current := work[len(work)-1]
		work = work[:len(work)-1]
		r := p.attempt(ctx, current)
		if r.TooLarge {
			if len(current) > 1 {
				half := len(current) / 2
				work = append(work, current[half:], current[:half])
				p.breaker.done(nil) // it answers
				continue
			}
			reason := "the backend refused it as too large"
			if r.Err != nil {
				reason += ": " + r.Err.Error()
			}
			r = output.Result{Rejected: []output.Rejection{{Index: 0, Reason: reason}}}
		}
		again, failed := p.verdict(current, r)
		if len(again) > 0 {
			work = append(work, again)
		}
		p.breaker.done(failed)
		if len(again) == 0 {
			failures = 0
			continue
		}
		if ctx.Err() != nil {
			return
		}
		delay := p.backoff(failures)
		failures++
		if r.Permanent {
			delay = p.cfg.MaxBackoff
		}
		delay = max(delay, min(r.RetryAfter, maxRetryAfter))
		if failed != nil {
			p.tell(failed, r.Permanent, failures, delay)
		}
		pause(ctx, delay)
	}
}

// attempt calls the output. An attempt that is under way when ctx ends may take
// its time for a while: without its answer all of it would be sent twice.
func (p *Pipeline) attempt(ctx context.Context, current []tail.Entry) output.Result {
	records := make([]*record.Record, len(current))
	for i, e := range current {
		records[i] = e.Record
	}
	wctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), p.cfg.WriteTimeout)
	var guard sync.WaitGroup
	defer guard.Wait()
	defer cancel()
	guard.Go(func() {
		select {
		case <-wctx.Done():
		case <-ctx.Done():
			pause(wctx, p.cfg.StopTimeout)
			cancel()
		}
	})
	return p.out.Write(wctx, records)
}

// verdict settles what the backend has decided on and returns the rest. failed
// is not nil where the backend took nothing.
func (p *Pipeline) verdict(current []tail.Entry, r output.Result) (again []tail.Entry, failed error) {
	if r.Err != nil {
		return current, r.Err
	}
	const acknowledged, rejected, retry = 0, 1, 2
	verdicts := make([]uint8, len(current))
	reasons := map[int]string{}
	mark := func(i int, v uint8) error {
		if i < 0 || i >= len(current) || verdicts[i] != acknowledged {
			return fmt.Errorf("output %s: verdict on record %d of %d is out of range or the second on it; nothing of the batch counts", p.cfg.Name, i, len(current))
		}
		verdicts[i] = v
		return nil
	}
	for _, i := range r.Retry {
		if err := mark(i, retry); err != nil {
			return current, err
		}
	}
	for _, x := range r.Rejected {
		if err := mark(x.Index, rejected); err != nil {
			return current, err
		}
		reasons[x.Index] = x.Reason
	}
	for i, e := range current {
		switch verdicts[i] {
		case retry:
			again = append(again, e)
			continue
		case rejected:
			p.bury(e, reasons[i])
			p.book.settle(e, ledger.Rejected)
		default:
			p.book.settle(e, ledger.Acknowledged)
		}
		p.free(e)
	}
	if len(again) == len(current) {
		failed = errors.New("the backend asks to send every record of the batch again")
	}
	return again, failed
}

func (p *Pipeline) bury(e tail.Entry, reason string) {
	result, err := p.dead.write(e.Record, reason)
	p.metrics.deadLetters.WithLabelValues(p.cfg.Name, result).Inc()
	if p.dead.mayTell() {
		switch result {
		case deadWritten:
			p.log.Warn("the backend rejected a record for good; it is in the dead letters", "file.path", p.dead.path,
				"log.file.path", e.Record.Origin.Path, "log.offset", e.Record.Origin.Offset, "error.message", reason)
		case deadFull:
			p.log.Error("the dead letters are at their limit; rejected records are dropped and counted; move the file away", "file.path", p.dead.path, "error.message", reason)
		default:
			p.log.Error("cannot write the dead letters; rejected records are dropped and counted; free space in the folder or move dataDir",
				"file.path", p.dead.path, "error.message", err.Error())
		}
	}
}

// backoff doubles from MinBackoff to MaxBackoff; half of it is random, so that
// the collectors of many nodes do not come back together.
func (p *Pipeline) backoff(failures int) time.Duration {
	d := p.cfg.MinBackoff
	for range failures {
		if d *= 2; d >= p.cfg.MaxBackoff {
			d = p.cfg.MaxBackoff
			break
		}
	}
	return d/2 + rand.N(d/2+1)
}

// tell logs the first failure in a row and then every tenth: each is at most
// MaxBackoff away from the next.
func (p *Pipeline) tell(err error, permanent bool, failures int, delay time.Duration) {
	if failures != 1 && failures%10 != 0 {
		return
	}
	message := "cannot ship logs; trying again; nothing is lost while the log files exist"
	if permanent {
		message = "cannot ship logs, and trying again will not help until the cause is removed; nothing is lost while the log files exist"
	}
	p.log.Error(message, "error.message", err.Error(), "outrigger.failures", failures, "outrigger.retry_after", delay.String())
}

// breaker is sony/gobreaker's for one caller that would rather wait than be
// refused.
type breaker struct {
	b         *gobreaker.TwoStepCircuitBreaker[struct{}]
	openFor   time.Duration
	openSince time.Time // changed only by the caller of wait and done
	current   atomic.Int32
	end       func(error)
}

func newBreaker(cfg Config, log *slog.Logger, m *Metrics) *breaker {
	b := &breaker{openFor: cfg.BreakerOpen}
	gauge := m.breaker.WithLabelValues(cfg.Name)
	b.b = gobreaker.NewTwoStepCircuitBreaker[struct{}](gobreaker.Settings{
		Name:        cfg.Name,
		Timeout:     cfg.BreakerOpen,
		ReadyToTrip: func(c gobreaker.Counts) bool { return c.ConsecutiveFailures >= cfg.BreakerFailures },
		OnStateChange: func(_ string, from, to gobreaker.State) {
			b.current.Store(int32(to))
			gauge.Set(float64(to))
			if to == gobreaker.StateOpen {
				b.openSince = time.Now()
			}
			log.Info("the output's circuit breaker changed", "outrigger.breaker.from", from.String(), "outrigger.breaker.to", to.String())
		},
	})
	return b
}

func (b *breaker) state() string { return gobreaker.State(b.current.Load()).String() }

// wait returns when an attempt may be made, or false when ctx has ended. The
// caller ends the attempt by done.
func (b *breaker) wait(ctx context.Context) bool {
	for ctx.Err() == nil {
		end, err := b.b.Allow()
		if err == nil {
			b.end = end
			return true
		}
		pause(ctx, max(time.Until(b.openSince.Add(b.openFor)), 10*time.Millisecond))
	}
	return false
}

func (b *breaker) done(err error) { b.end(err) }
