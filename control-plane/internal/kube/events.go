package kube

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/util/flowcontrol"
	"sigs.k8s.io/controller-runtime/pkg/client"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/outrigger-mesh/outrigger/control-plane/reporting"
)

// Reasons of Events.
const (
	// EventInvalid and EventConflicted are those of the condition Accepted, on a policy.
	EventInvalid    = string(gatewayv1.PolicyReasonInvalid)
	EventConflicted = string(gatewayv1.PolicyReasonConflicted)
	// EventOpened and EventClosed: a breaker did, of some caller. In Observe mode it
	// would have.
	EventOpened     = "BreakerOpened"
	EventClosed     = "BreakerClosed"
	EventWouldOpen  = "BreakerWouldOpen"
	EventWouldClose = "BreakerWouldClose"
	// EventRejected: a proxy refuses what the object has become (NACK).
	EventRejected = "RejectedByProxy"
)

const (
	// eventsPerSecond in all, and how many at once.
	eventsPerSecond = 5
	eventsAtOnce    = 25
	// eventMessage is how many bytes Kubernetes takes (Event validation).
	eventMessage = 1024
	// Of one breaker policy, which may have very many callers.
	changesPerSecond = 1.0 / 30
	changesAtOnce    = 10
	// mostSeen bounds what is remembered. When it is full all is forgotten: the API
	// server knows.
	mostSeen = 8192
)

// events writes Events about the objects of users. The name of each says what it is
// about, so that no replica, and no restart, says the same twice while the first is
// kept, which is an hour.
type events struct {
	c       *Cluster
	pod     string
	counted *prometheus.CounterVec
	limiter flowcontrol.PassiveRateLimiter
	seen    map[string]bool // namespace and name of Events that there are, or were too many
	changes map[objectKey]flowcontrol.PassiveRateLimiter
	nacks   map[string]bool // of those in seen, refusals that last
}

func newEvents(c *Cluster, pod string, counted *prometheus.CounterVec) *events {
	return &events{
		c: c, pod: pod, counted: counted, limiter: flowcontrol.NewTokenBucketPassiveRateLimiter(eventsPerSecond, eventsAtOnce),
		seen: map[string]bool{}, changes: map[objectKey]flowcontrol.PassiveRateLimiter{},
	}
}

// refused tells of a policy that has just been found out not to be accepted.
func (e *events) refused(ctx context.Context, o, before client.Object, newly []entry) {
	have, ok := read(o)
	if !ok || have.list != "ancestors" {
		return
	}
	was, _ := read(before)
	for _, n := range newly {
		now := meta.FindStatusCondition(n.Conditions, string(gatewayv1.PolicyConditionAccepted))
		if now == nil || now.Status != metav1.ConditionFalse || now.Reason != EventInvalid && now.Reason != EventConflicted {
			continue
		}
		if old := was.condition(n, now.Type); old != nil && old.ObservedGeneration == now.ObservedGeneration && old.Reason == now.Reason {
			continue // in other words
		}
		e.write(ctx, event{o, corev1.EventTypeWarning, now.Reason, now.Message, []string{now.Reason, strconv.FormatInt(now.ObservedGeneration, 10)}}, nil)
	}
}

// condition is the one of our entry about the same reference; nil where there is
// none.
func (w written) condition(of entry, kind string) *metav1.Condition {
	for _, e := range w.entries {
		if e.ControllerName == ControllerName && sameRef(e.ParentRef, of.ParentRef) {
			return meta.FindStatusCondition(e.Conditions, kind)
		}
	}
	return nil
}

// told tells of what proxies have reported: breakers that opened and closed, and
// configuration that was refused.
func (e *events) told(ctx context.Context, t totals) {
	if len(e.seen) > mostSeen {
		clear(e.seen)
	}
	lasting := map[string]bool{}
	maps.DeleteFunc(e.changes, func(k objectKey, _ flowcontrol.PassiveRateLimiter) bool { _, ok := t[k]; return !ok })
	for k, c := range t {
		if len(c.Changes) == 0 && len(c.Reasons) == 0 {
			continue
		}
		o, ok := e.c.source.object(k)
		if !ok {
			continue
		}
		for _, change := range c.Changes {
			if e.changes[k] == nil {
				e.changes[k] = flowcontrol.NewTokenBucketPassiveRateLimiter(changesPerSecond, changesAtOnce)
			}
			e.write(ctx, change.event(o), e.changes[k])
		}
		// Which proxy is first may change; what it says matters.
		for _, r := range c.Reasons {
			_, words, _ := strings.Cut(r, ": ")
			lasting[e.write(ctx, event{
				o, corev1.EventTypeWarning, EventRejected,
				fmt.Sprintf("%d of %d proxies refuse it and go on with the version before; %s", c.Rejected, c.Subscribed, r),
				[]string{EventRejected, words},
			}, nil)] = true
		}
	}
	for name := range e.nacks {
		if !lasting[name] {
			delete(e.seen, name)
		}
	}
	e.nacks = lasting
}

// event says that a breaker has changed, with its arithmetic.
func (c breakerChange) event(o client.Object) event {
	reason, kind := EventOpened, corev1.EventTypeWarning
	switch {
	case c.State == reporting.Open && c.Observe:
		reason, kind = EventWouldOpen, corev1.EventTypeNormal
	case c.State != reporting.Open && c.Observe:
		reason, kind = EventWouldClose, corev1.EventTypeNormal
	case c.State != reporting.Open:
		reason, kind = EventClosed, corev1.EventTypeNormal
	}
	return event{o, kind, reason, fmt.Sprintf("%s, called by %s: %s (%s)", c.Target, c.Caller, c.Reason, why(c.ID)), []string{c.Caller, c.ID}}
}

// event is one to be written.
type event struct {
	object  client.Object
	kind    string
	reason  string
	message string
	about   []string // two that are about the same are one
}

// write makes an Event, unless there is one about the same, and returns its
// namespace and name. What own, which may be
// nil, does not let through is dropped; what all Events together have no room for
// may be tried again.
func (e *events) write(ctx context.Context, v event, own flowcontrol.PassiveRateLimiter) (id string) {
	o := v.object
	gvk, err := e.c.client.GroupVersionKindFor(o)
	if err != nil {
		return "" // of no kind that we know
	}
	sum := sha256.Sum256([]byte(string(o.GetUID()) + "\x00" + strings.Join(v.about, "\x00")))
	// A name has at most 253 bytes.
	name := strings.TrimRight(o.GetName()[:min(len(o.GetName()), 200)], ".-") + "." + hex.EncodeToString(sum[:8])
	id = o.GetNamespace() + "/" + name
	if e.seen[id] {
		return id
	}
	if !e.limiter.TryAccept() {
		e.counted.WithLabelValues(v.reason, "limited").Inc()
		return id
	}
	e.seen[id] = true
	if own != nil && !own.TryAccept() {
		e.counted.WithLabelValues(v.reason, "limited").Inc()
		return id
	}
	message := v.message
	if len(message) > eventMessage {
		message = strings.ToValidUTF8(message[:eventMessage-3], "") + "..."
	}
	now := metav1.NewTime(time.Now())
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	err = e.c.client.Create(ctx, &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{Namespace: o.GetNamespace(), Name: name},
		InvolvedObject: corev1.ObjectReference{
			APIVersion: gvk.GroupVersion().String(), Kind: gvk.Kind, Namespace: o.GetNamespace(), Name: o.GetName(), UID: o.GetUID(), ResourceVersion: o.GetResourceVersion(),
		},
		Type: v.kind, Reason: v.reason, Message: message, FirstTimestamp: now, LastTimestamp: now, Count: 1,
		Source: corev1.EventSource{Component: userAgent}, ReportingController: string(ControllerName), ReportingInstance: e.pod,
	})
	switch {
	case err == nil:
		e.counted.WithLabelValues(v.reason, "created").Inc()
	case apierrors.IsAlreadyExists(err):
		e.counted.WithLabelValues(v.reason, "known").Inc()
	default:
		delete(e.seen, id)
		e.counted.WithLabelValues(v.reason, "failed").Inc()
		e.c.log.Debug("an Event cannot be written", "outrigger.object.kind", gvk.Kind, "outrigger.object.namespace", o.GetNamespace(),
			"outrigger.object.name", o.GetName(), "error.message", err.Error())
	}
	return id
}
