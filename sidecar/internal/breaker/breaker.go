// Package breaker decides whether a destination may be called: the
// service-level circuit breaker that each calling workload keeps.
//
//	closed    --a condition of trip is met--> open
//	open      --openFor has elapsed---------> half-open
//	half-open --halfOpenRequests succeed----> closed;  --one fails--> open
//
// The state machine is sony/gobreaker's; what counts, over which window, and
// why it opened is ours, because a breaker that cannot show its arithmetic is
// one that nobody trusts at 3 a.m. A flight recorder keeps the last outcomes,
// and every change of state freezes them as Evidence under an id.
//
// In Observe mode the same machine runs on the same traffic: it admits
// everything and says what it would have rejected. Requests that it would have
// rejected are not counted, since in Enforce mode they would not have happened.
//
// The time of every event is an argument, save that gobreaker reads the clock
// for its own timeout; tests run it under testing/synctest. A Breaker is safe
// for concurrent use. The caller must end every admitted Ticket, by Done or by
// Abandon.
package breaker

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sony/gobreaker/v2"
)

// State of a breaker. Closed: traffic flows.
type State int

// The states, in the order in which a gauge shows them: 0, 1, 2.
const (
	Closed State = iota
	HalfOpen
	Open
)

// String is the field's usual word.
func (s State) String() string {
	switch s {
	case Closed:
		return "closed"
	case HalfOpen:
		return "half-open"
	case Open:
		return "open"
	}
	return "unknown"
}

// Evidence is why a breaker changed its state: the very requests, and the
// arithmetic over them.
type Evidence struct {
	ID          string     `json:"id"`
	At          time.Time  `json:"at"`
	Policy      string     `json:"policy"`
	Destination string     `json:"destination"`
	Mode        string     `json:"mode"`
	From        string     `json:"from"`
	To          string     `json:"to"`
	Reason      string     `json:"reason"`
	Requests    []Recorded `json:"requests"`
}

// keptEvidence is how many pieces of evidence a breaker keeps; the log keeps
// the rest.
const keptEvidence = 16

// Breaker guards one destination.
type Breaker struct {
	policy      Policy
	destination string
	newID       func() string
	changed     func(Evidence)

	mu          sync.Mutex
	machine     *gobreaker.TwoStepCircuitBreaker[struct{}]
	rec         recorder
	win         window
	consecutive uint32
	probes      uint32 // successes since half-open
	now         time.Time
	reason      string // of the trip being decided
	generation  uint64 // of the state; a Ticket of another one is not counted
	openedAt    time.Time
	halfOpenAt  time.Time
	state       State
	evidence    []Evidence
	pending     []Evidence // to be reported once the lock is free
}

// New makes a closed breaker. newID names evidence. changed is called after
// every change of state, outside any lock, by the goroutine that caused it.
func New(p Policy, destination string, now time.Time, newID func() string, changed func(Evidence)) *Breaker {
	b := &Breaker{policy: p, destination: destination, newID: newID, changed: changed, win: newWindow(p.Window, now), now: now}
	b.machine = gobreaker.NewTwoStepCircuitBreaker[struct{}](gobreaker.Settings{
		Name:          destination,
		MaxRequests:   max(p.HalfOpenRequests, 1),
		Timeout:       p.OpenFor,
		ReadyToTrip:   func(gobreaker.Counts) bool { return b.trips() },
		OnStateChange: func(_ string, _, to gobreaker.State) { b.onChange(to) },
		IsExcluded:    func(err error) bool { return errors.Is(err, errAbandoned) },
	})
	return b
}

// Policy that the breaker was made with.
func (b *Breaker) Policy() Policy { return b.policy }

var (
	errAbandoned = errors.New("abandoned")
	errFailed    = errors.New("failed")
)

// Ticket is the right to make one attempt. The zero Ticket stands for an
// attempt that is not counted.
type Ticket struct {
	counted    bool
	done       func(error) // of gobreaker; nil for a Ticket of the closed state
	generation uint64
}

// Verdict on one attempt.
type Verdict struct {
	// Admit the attempt.
	Admit bool
	// Rejected is set where the policy says no: in Observe mode beside Admit.
	Rejected bool
	State    State
	// RetryAfter is when the breaker will probe; 0 unless Rejected.
	RetryAfter time.Duration
	Ticket     Ticket
}

// Allow asks for one attempt at now.
func (b *Breaker) Allow(now time.Time) Verdict {
	b.mu.Lock()
	b.now = now
	if b.state == Closed {
		// Everyone is admitted, and gobreaker hears of the failure that opens: what it
		// would return for each attempt is a closure.
		v := Verdict{Admit: true, State: Closed, Ticket: Ticket{counted: true, generation: b.generation}}
		b.mu.Unlock()
		return v
	}
	done, err := b.machine.Allow()
	v := Verdict{State: b.state}
	if err == nil {
		v.Admit, v.Ticket = true, Ticket{true, done, b.generation}
	} else {
		v.Rejected, v.Admit = true, b.policy.Observe
		if b.state == Open {
			v.RetryAfter = max(b.openedAt.Add(b.policy.OpenFor).Sub(now), 0)
		}
	}
	b.unlockAndReport()
	return v
}

// Done ends a Ticket with the outcome of its attempt.
func (b *Breaker) Done(t Ticket, o *Outcome) {
	if !t.counted {
		return
	}
	b.mu.Lock()
	b.now = o.At.Add(o.Duration)
	if o.Ended.After(b.now) {
		b.now = o.Ended
	}
	failure := o.Failed&b.policy.FailureOn != 0
	slow := b.policy.SlowCallThreshold > 0 && o.Duration >= b.policy.SlowCallThreshold
	if t.generation != b.generation { // begun before the state changed: it says nothing about this one
		b.mu.Unlock()
		return
	}
	b.rec.add(o, failure, slow)
	b.win.add(b.now, failure, slow)
	if failure {
		b.consecutive++
	} else {
		b.consecutive = 0
	}
	switch {
	case b.state == Closed:
		if (failure || slow) && b.trips() {
			b.open()
		}
	case failure, slow && b.state == HalfOpen:
		t.done(errFailed)
	default:
		if b.state == HalfOpen {
			b.probes++
		}
		t.done(nil)
	}
	b.unlockAndReport()
}

// open tells gobreaker of the failure that opens a closed breaker: it asks trips
// again.
func (b *Breaker) open() {
	done, err := b.machine.Allow()
	if err != nil {
		panic("breaker: closed here, open in gobreaker: " + err.Error())
	}
	done(errFailed)
}

// Abandon ends a Ticket whose attempt says nothing about the destination: the
// caller went away, or the attempt was never made.
func (b *Breaker) Abandon(t Ticket) {
	if t.done == nil { // in the closed state nobody waits for it
		return
	}
	b.mu.Lock()
	t.done(errAbandoned)
	b.unlockAndReport()
}

// State at now, with the time left until it probes where it is open.
func (b *Breaker) State(now time.Time) (State, time.Duration) {
	b.mu.Lock()
	defer b.unlockAndReport()
	b.now = now
	b.machine.State() // lets an elapsed openFor become half-open
	if b.state != Open {
		return b.state, 0
	}
	return b.state, max(b.openedAt.Add(b.policy.OpenFor).Sub(now), 0)
}

// Evidence of the last changes, newest first.
func (b *Breaker) Evidence() []Evidence {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := make([]Evidence, 0, len(b.evidence))
	for i := range b.evidence {
		out = append(out, b.evidence[len(b.evidence)-1-i])
	}
	return out
}

// trips evaluates the conditions and writes the arithmetic down. It is called
// with the lock held.
func (b *Breaker) trips() bool {
	p := &b.policy
	if p.ConsecutiveFailures > 0 && b.consecutive >= p.ConsecutiveFailures {
		b.reason = fmt.Sprintf("%d consecutive failures >= %d", b.consecutive, p.ConsecutiveFailures)
		return true
	}
	if p.FailureRatio == 0 && p.SlowCallRatio == 0 {
		return false
	}
	s := b.win.sum(b.now)
	if s.total < max(p.MinimumRequests, 1) {
		return false
	}
	if ratio := float64(s.failed) / float64(s.total); p.FailureRatio > 0 && ratio >= p.FailureRatio {
		b.reason = fmt.Sprintf("failure ratio %.2f >= %.2f over %s (%d of %d)", ratio, p.FailureRatio, p.Window, s.failed, s.total)
		return true
	}
	if ratio := float64(s.slow) / float64(s.total); p.SlowCallRatio > 0 && ratio >= p.SlowCallRatio {
		b.reason = fmt.Sprintf("slow-call ratio %.2f >= %.2f over %s (%d of %d took %s or longer)", ratio, p.SlowCallRatio, p.Window, s.slow, s.total, p.SlowCallThreshold)
		return true
	}
	return false
}

// onChange is called by gobreaker with our lock held.
func (b *Breaker) onChange(to gobreaker.State) {
	e := Evidence{ID: b.newID(), At: b.now, Policy: b.policy.Name, Destination: b.destination, Mode: "Enforce", From: b.state.String()}
	if b.policy.Observe {
		e.Mode = "Observe"
	}
	switch to {
	case gobreaker.StateOpen:
		e.Reason = b.reason
		since := b.now.Add(-max(b.policy.Window, time.Second))
		if b.state == HalfOpen {
			e.Reason = fmt.Sprintf("probe %d of %d failed", b.probes+1, max(b.policy.HalfOpenRequests, 1))
			since = b.halfOpenAt
		}
		e.Requests = b.rec.last(since)
		b.state, b.openedAt = Open, b.now
	case gobreaker.StateHalfOpen:
		e.Reason = fmt.Sprintf("open for %s; probing with %d requests", b.policy.OpenFor, max(b.policy.HalfOpenRequests, 1))
		b.state, b.halfOpenAt, b.probes = HalfOpen, b.now, 0
	case gobreaker.StateClosed:
		e.Reason = fmt.Sprintf("%d of %d probes succeeded", b.probes, max(b.policy.HalfOpenRequests, 1))
		e.Requests = b.rec.last(b.halfOpenAt)
		b.state = Closed
		// What tripped it must not trip it again.
		b.win = newWindow(b.policy.Window, b.now)
		b.consecutive = 0
	}
	e.To = b.state.String()
	b.generation++
	b.evidence = append(b.evidence, e)
	if len(b.evidence) > keptEvidence {
		b.evidence = append(b.evidence[:0], b.evidence[1:]...)
	}
	b.pending = append(b.pending, e)
}

func (b *Breaker) unlockAndReport() {
	pending := b.pending
	b.pending = nil
	b.mu.Unlock()
	for _, e := range pending {
		b.changed(e)
	}
}

// grpcStatuses are the status names that failureOn may hold, in the order of
// their codes from 1 on (gRPC's codes.Code).
var grpcStatuses = [...]string{
	"cancelled", "unknown", "invalid-argument", "deadline-exceeded", "not-found", "already-exists", "permission-denied", "resource-exhausted",
	"failed-precondition", "aborted", "out-of-range", "unimplemented", "internal", "unavailable", "data-loss", "unauthenticated",
}

// GRPCFailures says which failures a gRPC status is, in the words of gRPC; none
// for 0, which is OK, and for codes that gRPC does not know.
func GRPCFailures(code int) Failures {
	if code < 1 || code > len(grpcStatuses) {
		return 0
	}
	return failGRPC << (code - 1)
}

// ParseFailures reads the words of failureOn.
func ParseFailures(words []string) (Failures, error) {
	var f Failures
	for _, w := range words {
		switch strings.ToLower(w) {
		case "5xx":
			f |= Fail5xx
		case "gateway-error":
			f |= FailGatewayError
		case "connect-failure":
			f |= FailConnectFailure
		case "reset":
			f |= FailReset
		case "timeout":
			f |= FailTimeout
		default:
			code := slices.Index(grpcStatuses[:], strings.ToLower(w)) + 1
			if code == 0 {
				return 0, fmt.Errorf("failureOn %q is not one of 5xx, gateway-error, connect-failure, reset, timeout, nor a gRPC status such as unavailable", w)
			}
			f |= GRPCFailures(code)
		}
	}
	return f, nil
}

// StatusFailures says which failures a response status is.
func StatusFailures(status int) Failures {
	switch {
	case status == 502 || status == 503 || status == 504:
		return Fail5xx | FailGatewayError
	case status >= 500 && status <= 599:
		return Fail5xx
	}
	return 0
}
