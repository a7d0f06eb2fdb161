package kube

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
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
)

// Reasons of Events.
const (
	// EventInvalid and EventConflicted are those of the condition Accepted, on a policy.
	EventInvalid    = string(gatewayv1.PolicyReasonInvalid)
	EventConflicted = string(gatewayv1.PolicyReasonConflicted)
)

const (
	// eventsPerSecond in all, and how many at once.
	eventsPerSecond = 5
	eventsAtOnce    = 25
	// eventMessage is how many bytes Kubernetes takes (Event validation).
	eventMessage = 1024
)

// events writes Events about the objects of users. The name of each says what it is
// about, so that no replica, and no restart, says the same twice while the first is
// kept, which is an hour.
type events struct {
	c       *Cluster
	pod     string
	counted *prometheus.CounterVec
	limiter flowcontrol.PassiveRateLimiter
}

func newEvents(c *Cluster, pod string, counted *prometheus.CounterVec) *events {
	return &events{c: c, pod: pod, counted: counted, limiter: flowcontrol.NewTokenBucketPassiveRateLimiter(eventsPerSecond, eventsAtOnce)}
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
		e.write(ctx, o, corev1.EventTypeWarning, now.Reason, now.Message, now.Reason, strconv.FormatInt(now.ObservedGeneration, 10))
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

// write makes an Event, unless there is one about the same: about says what it is.
func (e *events) write(ctx context.Context, o client.Object, kind, reason, message string, about ...string) {
	gvk, err := e.c.client.GroupVersionKindFor(o)
	if err != nil {
		return // of no kind that we know
	}
	if !e.limiter.TryAccept() {
		e.counted.WithLabelValues(reason, "limited").Inc()
		return
	}
	if len(message) > eventMessage {
		message = strings.ToValidUTF8(message[:eventMessage-3], "") + "..."
	}
	sum := sha256.Sum256([]byte(string(o.GetUID()) + "\x00" + strings.Join(about, "\x00")))
	now := metav1.NewTime(time.Now())
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	err = e.c.client.Create(ctx, &corev1.Event{
		// A name has at most 253 bytes.
		ObjectMeta: metav1.ObjectMeta{Namespace: o.GetNamespace(), Name: strings.TrimRight(o.GetName()[:min(len(o.GetName()), 200)], ".-") + "." + hex.EncodeToString(sum[:8])},
		InvolvedObject: corev1.ObjectReference{
			APIVersion: gvk.GroupVersion().String(), Kind: gvk.Kind, Namespace: o.GetNamespace(), Name: o.GetName(), UID: o.GetUID(), ResourceVersion: o.GetResourceVersion(),
		},
		Type: kind, Reason: reason, Message: message, FirstTimestamp: now, LastTimestamp: now, Count: 1,
		Source: corev1.EventSource{Component: userAgent}, ReportingController: string(ControllerName), ReportingInstance: e.pod,
	})
	switch {
	case err == nil:
		e.counted.WithLabelValues(reason, "created").Inc()
	case apierrors.IsAlreadyExists(err):
		e.counted.WithLabelValues(reason, "known").Inc()
	default:
		e.counted.WithLabelValues(reason, "failed").Inc()
		e.c.log.Debug("an Event cannot be written", "outrigger.object.kind", gvk.Kind, "outrigger.object.namespace", o.GetNamespace(),
			"outrigger.object.name", o.GetName(), "error.message", err.Error())
	}
}
