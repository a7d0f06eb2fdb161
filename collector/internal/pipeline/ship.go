package pipeline

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/internal/ledger"
	"github.com/outrigger-mesh/outrigger/collector/internal/output"
	"github.com/outrigger-mesh/outrigger/collector/internal/tail"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// maxRetryAfter bounds what a backend may ask for.
const maxRetryAfter = 5 * time.Minute

// ship sends batches until ctx ends. What it has taken and not settled then is
// read again after the restart.
func (p *Pipeline) ship(ctx context.Context) {
	var senders sync.WaitGroup
	for range p.traits.Concurrency {
		senders.Go(func() {
			for {
				select {
				case <-ctx.Done():
					return
				case b := <-p.queue:
					p.wake() // there is room in the queue
					if !p.send(ctx, b) {
						return
					}
					b.reset()
					select {
					case p.spare <- b:
					default:
					}
				}
			}
		})
	}
	senders.Wait()
}

// work is a part of a batch: the entries and their records.
type work struct {
	entries []tail.Entry
	records []*record.Record
}

// send sends a batch until every record of it is settled. It returns false if ctx
// ended before.
func (p *Pipeline) send(ctx context.Context, b *batch) bool {
	failures := 0
	todo := []work{{b.entries, b.records}} // the last is next
	for attempt := 0; len(todo) > 0; attempt++ {
		if !p.limiter.acquire(ctx) {
			return false
		}
		done := p.breaker.wait(ctx)
		if done == nil {
			p.limiter.release(true)
			return false
		}
		if attempt > 0 {
			p.metrics.retries.WithLabelValues(p.cfg.Name).Inc()
		}
		current := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		r := p.attempt(ctx, current.records)
		if r.TooLarge {
			if n := len(current.entries); n > 1 {
				half := n / 2
				todo = append(todo, work{current.entries[half:], current.records[half:]}, work{current.entries[:half], current.records[:half]})
				done(nil) // it answers
				p.limiter.release(true)
				continue
			}
			reason := "the backend refused it as too large"
			if r.Err != nil {
				reason += ": " + r.Err.Error()
			}
			r = output.Result{Rejected: []output.Rejection{{Index: 0, Reason: reason}}}
		}
		again, failed := p.verdict(current, r)
		if len(again.entries) > 0 {
			todo = append(todo, again)
		}
		done(failed)
		p.limiter.release(len(again.entries) == 0)
		if len(again.entries) == 0 {
			failures = 0
			continue
		}
		if ctx.Err() != nil {
			return false
		}
		delay := p.backoff(failures)
		failures++
		switch {
		case r.Permanent:
			delay = p.cfg.MaxBackoff
		case failed != nil && p.breaker.delay() > 0:
			delay = 0 // the breaker says when
		}
		if wait := min(r.RetryAfter, maxRetryAfter); failed != nil && wait > 0 {
			p.breaker.hold(wait) // the backend asks it of all senders
		} else {
			delay = max(delay, wait)
		}
		if failed != nil {
			p.tell(failed, r.Permanent, failures, max(delay, p.breaker.delay()))
		}
		pause(ctx, delay)
	}
	return true
}

// attempt calls the output. An attempt that is under way when ctx ends may take
// its time for a while: without its answer all of it would be sent twice.
func (p *Pipeline) attempt(ctx context.Context, records []*record.Record) output.Result {
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
func (p *Pipeline) verdict(current work, r output.Result) (again work, failed error) {
	if r.Err != nil {
		return current, r.Err
	}
	if len(r.Retry)+len(r.Rejected) == 0 {
		p.book.settle(current.entries, ledger.Acknowledged)
		p.free(current.entries)
		return work{}, nil
	}
	const acknowledged, rejected, retry = 0, 1, 2
	verdicts := make([]uint8, len(current.entries))
	reasons := map[int]string{}
	mark := func(i int, v uint8) error {
		if i < 0 || i >= len(verdicts) || verdicts[i] != acknowledged {
			return fmt.Errorf("output %s: verdict on record %d of %d is out of range or the second on it; nothing of the batch counts", p.cfg.Name, i, len(verdicts))
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
	var good, bad []tail.Entry
	for i, e := range current.entries {
		switch verdicts[i] {
		case retry:
			again.entries, again.records = append(again.entries, e), append(again.records, e.Record)
		case rejected:
			p.bury(e, reasons[i])
			bad = append(bad, e)
		default:
			good = append(good, e)
		}
	}
	for cause, es := range map[ledger.Cause][]tail.Entry{ledger.Acknowledged: good, ledger.Rejected: bad} {
		if len(es) > 0 {
			p.book.settle(es, cause)
			p.free(es)
		}
	}
	if len(again.entries) == len(current.entries) {
		failed = errors.New("the backend asks to send every record of the batch again")
	}
	return again, failed
}

func (p *Pipeline) bury(e tail.Entry, reason string) {
	p.why.note(e.Record, ledger.Rejected, reason, cost(e))
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
// MaxBackoff or BreakerOpen away from the next.
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
