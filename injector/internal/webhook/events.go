package webhook

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// Limits of what is said in Events.
const (
	eventQueue   = 256              // waiting to be written; more are dropped and counted
	eventTimeout = 5 * time.Second  // of writing one
	eventAgain   = 10 * time.Minute // before the same is said of the same object once more
	eventMemory  = 4096             // of what was said
	maxMessage   = 1024             // bytes, as Kubernetes allows
)

// Reasons of our Events.
const (
	ReasonSkipped   = "InjectionSkipped" // the pod runs without its sidecar
	ReasonRefused   = "InjectionRefused" // the pod was not created
	ReasonNotMeshed = "NotMeshed"        // the audit found it
)

// Event is one sentence about an object.
type Event struct {
	About           corev1.ObjectReference
	Reason, Message string
}

// Events writes Events to the cluster, each at most once in ten minutes, and
// never holds up who tells it. Safe for concurrent use.
type Events struct {
	client  kubernetes.Interface
	log     *slog.Logger
	now     func() time.Time
	queue   chan Event
	results *prometheus.CounterVec
	said    map[Event]time.Time // of Run's goroutine
}

// NewEvents registers its metric. now is the clock.
func NewEvents(client kubernetes.Interface, log *slog.Logger, reg prometheus.Registerer, now func() time.Time) (*Events, error) {
	e := &Events{
		client: client, log: log, now: now, queue: make(chan Event, eventQueue), said: map[Event]time.Time{},
		results: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "outrigger_injector_events_total",
			Help: "Kubernetes Events by what became of them: written, repeated (said already), dropped (the queue was full), failed.",
		}, []string{"result"}),
	}
	if err := reg.Register(e.results); err != nil {
		return nil, fmt.Errorf("webhook: registering metrics: %w", err)
	}
	return e, nil
}

// Tell queues an Event. A nil Events says nothing.
func (e *Events) Tell(ev Event) {
	if e == nil {
		return
	}
	if len(ev.Message) > maxMessage {
		ev.Message = strings.ToValidUTF8(ev.Message[:maxMessage-3], "") + "..."
	}
	select {
	case e.queue <- ev:
	default:
		e.results.WithLabelValues("dropped").Inc()
	}
}

// Run writes until ctx ends; what waits then is not written.
func (e *Events) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case ev := <-e.queue:
			e.write(ctx, ev)
		}
	}
}

func (e *Events) write(ctx context.Context, ev Event) {
	now := e.now()
	if at, ok := e.said[ev]; ok && now.Sub(at) < eventAgain {
		e.results.WithLabelValues("repeated").Inc()
		return
	}
	if len(e.said) >= eventMemory {
		clear(e.said)
	}
	e.said[ev] = now
	ctx, cancel := context.WithTimeout(ctx, eventTimeout)
	defer cancel()
	stamp := metav1.NewTime(now)
	_, err := e.client.CoreV1().Events(ev.About.Namespace).Create(ctx, &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{GenerateName: "outrigger-", Namespace: ev.About.Namespace},
		InvolvedObject: ev.About, Reason: ev.Reason, Message: ev.Message, Type: corev1.EventTypeWarning,
		Source: corev1.EventSource{Component: "outrigger-injector"}, Count: 1, FirstTimestamp: stamp, LastTimestamp: stamp,
		ReportingController: "outrigger.dev/injector",
	}, metav1.CreateOptions{})
	switch {
	case err == nil:
		e.results.WithLabelValues("written").Inc()
	case apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause):
		e.results.WithLabelValues("dropped").Inc()
	case ctx.Err() == nil || errors.Is(ctx.Err(), context.DeadlineExceeded):
		e.results.WithLabelValues("failed").Inc()
		delete(e.said, ev)
		e.log.Warn("an Event could not be written", "event.reason", ev.Reason, "kubernetes.namespace", ev.About.Namespace, "error.message", err.Error())
	}
}
