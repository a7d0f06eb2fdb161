package outlier

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// maxEjectionTime bounds how long an endpoint stays out, unless
// BaseEjectionTime is longer: Envoy's default of max_ejection_time.
const maxEjectionTime = 300 * time.Second

// Result is how an attempt at an endpoint ended.
type Result struct {
	// Status of the response; not looked at where LocalOrigin is set.
	Status int
	// LocalOrigin: there was no response, because connecting failed, the
	// connection was lost or the attempt timed out. It counts as a gateway
	// error, as in Envoy where split_external_local_origin_errors is off.
	LocalOrigin bool
}

func (r Result) failed() bool  { return r.LocalOrigin || r.Status >= 500 && r.Status <= 599 }
func (r Result) gateway() bool { return r.LocalOrigin || r.Status >= 502 && r.Status <= 504 }

// Action is what an Event says happened.
type Action string

// The actions.
const (
	// Eject: the endpoint was taken out; in Observe mode, would have been.
	Eject Action = "eject"
	// Return: an ejection is over.
	Return Action = "return"
	// Capped: the endpoint failed as an ejected one does, and was left in
	// because MaxEjectionPercent allows no more ejections.
	Capped Action = "capped"
)

// Cause is which rule of the Policy an endpoint broke.
type Cause string

// The causes, in the words of the CircuitBreaker object.
const (
	Consecutive5xx           Cause = "consecutive5xx"
	ConsecutiveGatewayErrors Cause = "consecutiveGatewayErrors"
	FailureShare             Cause = "failurePercentage"
)

// Event is one change of an endpoint, with the arithmetic behind it.
type Event struct {
	At       time.Time
	Endpoint netip.AddrPort
	Action   Action
	// Cause of an Eject or Capped; of a Return, that of its ejection.
	Cause Cause
	// Observe: nothing was done, the policy only observes.
	Observe bool
	// For is how long an Eject lasts; the sweep after that ends it.
	For time.Duration
	// Ejected of Endpoints are out after this event.
	Ejected, Endpoints int
	// Reason is the arithmetic, for people.
	Reason string
}

// Detector watches the endpoints of one cluster. It is not safe for concurrent
// use.
type Detector struct {
	policy    Policy
	endpoints map[netip.AddrPort]*endpoint
	ejected   int
	swept     time.Time // the start of the interval
}

type endpoint struct {
	consecutive5xx     uint32
	consecutiveGateway uint32
	// Of this interval.
	requests, failures uint32

	out        bool
	cause      Cause
	ejectedAt  time.Time
	returnedAt time.Time
	// times is the multiplier of BaseEjectionTime: one more for each ejection,
	// one less for each interval in peace.
	times uint32
}

// New makes a Detector that watches no endpoint yet.
func New(p Policy) *Detector {
	return &Detector{policy: p, endpoints: map[netip.AddrPort]*endpoint{}}
}

// SetPolicy changes the rules and keeps what is known of the endpoints, unless
// the mode changes: an ejection that was only observed must not come into force
// unannounced.
func (d *Detector) SetPolicy(p Policy) {
	if p.Observe != d.policy.Observe {
		for _, e := range d.endpoints {
			*e = endpoint{}
		}
		d.ejected = 0
	}
	d.policy = p
}

// SetEndpoints replaces the endpoints that are watched. What is known of those
// that stay is kept, ejections included.
func (d *Detector) SetEndpoints(addrs []netip.AddrPort) {
	next := make(map[netip.AddrPort]*endpoint, len(addrs))
	ejected := 0
	for _, a := range addrs {
		e := d.endpoints[a]
		if e == nil {
			e = &endpoint{}
		}
		if _, twice := next[a]; !twice && e.out {
			ejected++
		}
		next[a] = e
	}
	d.endpoints, d.ejected = next, ejected
}

// Ejected reports whether the endpoint should get no requests. In Observe mode
// and for unknown endpoints it is false.
func (d *Detector) Ejected(addr netip.AddrPort) bool {
	e := d.endpoints[addr]
	return e != nil && e.out && !d.policy.Observe
}

// Record counts a result. It reports an Event where a consecutive rule was
// broken. Results of an endpoint that is out, or would be in Enforce mode, are
// not counted: they would not have happened. Unknown endpoints are ignored.
func (d *Detector) Record(now time.Time, addr netip.AddrPort, r Result) (Event, bool) {
	if d.swept.IsZero() {
		d.swept = now
	}
	e := d.endpoints[addr]
	if e == nil || e.out {
		return Event{}, false
	}
	e.requests++
	if !r.failed() {
		e.consecutive5xx, e.consecutiveGateway = 0, 0
		return Event{}, false
	}
	e.failures++
	e.consecutive5xx++
	if r.gateway() {
		e.consecutiveGateway++
	} else {
		e.consecutiveGateway = 0
	}
	// Both rules may be met at once; Envoy looks at gateway errors first.
	if n := d.policy.ConsecutiveGatewayErrors; n > 0 && e.consecutiveGateway >= n {
		e.consecutiveGateway = 0
		return d.eject(now, addr, e, ConsecutiveGatewayErrors, fmt.Sprintf("%d consecutive gateway errors", n)), true
	}
	if n := d.policy.Consecutive5xx; n > 0 && e.consecutive5xx >= n {
		e.consecutive5xx = 0
		return d.eject(now, addr, e, Consecutive5xx, fmt.Sprintf("%d consecutive 5xx", n)), true
	}
	return Event{}, false
}

// Sweep ends the interval, if Policy.Interval has passed since the last one
// did: ejections that have lasted long enough end, and the failure percentage of
// the interval is looked at. Called more often it does nothing. The Events are
// in the order of the addresses, returns first.
func (d *Detector) Sweep(now time.Time) []Event {
	if d.swept.IsZero() {
		d.swept = now
	}
	if now.Sub(d.swept) < d.policy.Interval {
		return nil
	}
	d.swept = now
	addrs := make([]netip.AddrPort, 0, len(d.endpoints))
	for a := range d.endpoints {
		addrs = append(addrs, a)
	}
	slices.SortFunc(addrs, netip.AddrPort.Compare)
	var events []Event
	for _, a := range addrs {
		e := d.endpoints[a]
		if lasts := d.lasts(e); e.out && now.Sub(e.ejectedAt) >= lasts {
			cause := e.cause
			*e = endpoint{returnedAt: now, times: e.times}
			d.ejected--
			events = append(events, Event{
				At: now, Endpoint: a, Action: Return, Cause: cause, Observe: d.policy.Observe, Ejected: d.ejected, Endpoints: len(d.endpoints),
				Reason: fmt.Sprintf("%v are over; %d of %d endpoints ejected", lasts, d.ejected, len(d.endpoints)),
			})
		}
	}
	events = append(events, d.failureShares(now, addrs)...)
	for _, a := range addrs {
		e := d.endpoints[a]
		e.requests, e.failures = 0, 0
		if !e.out && e.times > 0 && now.Sub(e.returnedAt) >= d.policy.Interval {
			e.times--
		}
	}
	return events
}

// failureShares applies the failure percentage, the worst endpoint first, so
// that a cap spares the better ones.
func (d *Detector) failureShares(now time.Time, addrs []netip.AddrPort) []Event {
	rule := d.policy.FailurePercentage
	if rule.Threshold == 0 {
		return nil
	}
	var judged []netip.AddrPort
	for _, a := range addrs {
		if e := d.endpoints[a]; !e.out && e.requests > 0 && e.requests >= rule.RequestVolume {
			judged = append(judged, a)
		}
	}
	if len(judged) < int(rule.MinimumHosts) {
		return nil
	}
	slices.SortStableFunc(judged, func(a, b netip.AddrPort) int {
		x, y := d.endpoints[a], d.endpoints[b]
		return cmp.Compare(uint64(y.failures)*uint64(x.requests), uint64(x.failures)*uint64(y.requests))
	})
	var events []Event
	for _, a := range judged {
		e := d.endpoints[a]
		if uint64(e.failures)*100 < uint64(rule.Threshold)*uint64(e.requests) {
			break
		}
		events = append(events, d.eject(now, a, e, FailureShare,
			fmt.Sprintf("%d/%d failing in %v, %.4g %% >= %d %%", e.failures, e.requests, d.policy.Interval, 100*float64(e.failures)/float64(e.requests), rule.Threshold)))
	}
	return events
}

// eject takes an endpoint out, unless that would be more than
// MaxEjectionPercent. With few endpoints the percentage may allow none: of one
// endpoint, 50 % is less than one.
func (d *Detector) eject(now time.Time, addr netip.AddrPort, e *endpoint, cause Cause, why string) Event {
	ev := Event{At: now, Endpoint: addr, Cause: cause, Observe: d.policy.Observe, Ejected: d.ejected, Endpoints: len(d.endpoints)}
	most := min(d.policy.MaxEjectionPercent, 100)
	if uint64(d.ejected+1)*100 > uint64(most)*uint64(len(d.endpoints)) {
		ev.Action = Capped
		ev.Reason = fmt.Sprintf("%s; %d of %d endpoints ejected, capped by %d %%", why, d.ejected, len(d.endpoints), most)
		return ev
	}
	d.ejected++
	e.out, e.cause, e.ejectedAt = true, cause, now
	if time.Duration(e.times)*d.policy.BaseEjectionTime < d.longest()+d.policy.BaseEjectionTime {
		e.times++
	}
	ev.Action, ev.Ejected, ev.For = Eject, d.ejected, d.lasts(e)
	verb := "ejected"
	if d.policy.Observe {
		verb = "would have ejected"
	}
	ev.Reason = fmt.Sprintf("%s; %s %d of %d endpoints for %v, at most %d %%", why, verb, d.ejected, len(d.endpoints), ev.For, most)
	return ev
}

// lasts is how long the ejection of e lasts.
func (d *Detector) lasts(e *endpoint) time.Duration {
	return min(time.Duration(e.times)*d.policy.BaseEjectionTime, d.longest())
}

func (d *Detector) longest() time.Duration { return max(maxEjectionTime, d.policy.BaseEjectionTime) }
