// Package webhook is the mutating admission endpoint: it answers the API
// server's reviews of new pods with the patch that adds the sidecar.
//
// It knows the AdmissionReview protocol (admission.k8s.io/v1), its limits, the
// serving certificate, and what the injector asks of the cluster: the labels of
// namespaces, its own certificate's Secret, Events, and the pods that the audit
// looks at. It does not know the rules of injection, which are package patch's,
// nor those of the audit. The injector's main runs the server.
//
// The webhook's namespaceSelector is the gate: only namespaces labelled
// outrigger.dev/injection=enabled, or pods so labelled by a second entry with an
// objectSelector, may be sent here, and a request that arrives is taken as one
// from an enabled namespace: what the injector has seen of the namespace may be
// older than what the API server has. The pod's own label still wins.
//
// Whoever reaches the endpoint is answered: the answer holds what everybody may
// read in the pods of the mesh, and changes nothing.
package webhook

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"mime"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/outrigger-mesh/outrigger/injector/patch"
)

// MaxBody is how many bytes of a review are read; the API server's own limit for
// an object is smaller.
const MaxBody = 3 << 20

// The values of outrigger_injections_total's label result.
const (
	resultInjected  = "injected"
	resultSkipped   = "skipped"   // with its reason in the log and, where it asked, on the pod
	resultAgain     = "again"     // injected before, and invoked once more
	resultDenied    = "denied"    // an annotation or label that cannot be followed
	resultIgnored   = "ignored"   // not the creation of a pod
	resultMalformed = "malformed" // not a review; answered 4xx
)

// Handler answers POST /mutate. Safe for concurrent use.
type Handler struct {
	settings   patch.Settings
	namespaces *Namespaces
	events     *Events
	log        *slog.Logger
	results    *prometheus.CounterVec
	durations  prometheus.Histogram
	rejected   *prometheus.CounterVec
}

// Cluster is what a Handler has of the cluster; without it, it asks nobody.
type Cluster struct {
	Namespaces *Namespaces
	Events     *Events
}

// New validates the settings and registers the Handler's metrics.
func New(s patch.Settings, c Cluster, log *slog.Logger, reg prometheus.Registerer) (*Handler, error) {
	if err := s.Validate(); err != nil {
		return nil, err
	}
	h := &Handler{
		settings: s, namespaces: c.Namespaces, events: c.Events, log: log,
		results: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "outrigger_injections_total",
			Help: "Reviews by what became of them: injected, again (injected before), skipped, denied, ignored (no new pod), malformed.",
		}, []string{"result"}),
		durations: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "outrigger_injection_duration_seconds",
			Help: "Time from the first byte of a review to its answer.",
			// The API server waits for it with every new pod.
			Buckets: []float64{0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 1},
		}),
		rejected: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "outrigger_webhook_rejected_total",
			Help: "Calls of the webhook that were not looked at: rate (429), gone (the caller left), panic (a bug).",
		}, []string{"cause"}),
	}
	for _, r := range []string{resultInjected, resultAgain, resultSkipped, resultDenied, resultIgnored, resultMalformed} {
		h.results.WithLabelValues(r)
	}
	for _, m := range []prometheus.Collector{h.results, h.durations, h.rejected} {
		if err := reg.Register(m); err != nil {
			return nil, fmt.Errorf("webhook: registering metrics: %w", err)
		}
	}
	return h, nil
}

// Endpoint routes /mutate to the handler and nothing else, within the limits of
// a caller.
func (h *Handler) Endpoint() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("POST /mutate", h)
	return limit(mux, h.log, h.rejected)
}

// ServeHTTP answers one review. What is no review is answered 4xx with a
// sentence, which the API server puts into its log and, by failurePolicy, into
// the user's error.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	begin := time.Now()
	defer func() { h.durations.Observe(time.Since(begin).Seconds()) }()
	fail := func(code int, format string, args ...any) {
		h.results.WithLabelValues(resultMalformed).Inc()
		message := fmt.Sprintf(format, args...)
		h.log.Warn("not an admission review", "http.response.status_code", code, "error.message", message)
		http.Error(w, message, code)
	}
	if media, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || media != "application/json" {
		fail(http.StatusUnsupportedMediaType, "content type %q: a review is application/json", r.Header.Get("Content-Type"))
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, MaxBody))
	if err != nil {
		if over := (*http.MaxBytesError)(nil); errors.As(err, &over) {
			fail(http.StatusRequestEntityTooLarge, "the review is over %d bytes", over.Limit)
			return
		}
		fail(http.StatusBadRequest, "the review could not be read: %v", err)
		return
	}
	answer, err := h.review(body)
	if err != nil {
		fail(http.StatusBadRequest, "%v", err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if _, err := w.Write(answer); err != nil {
		h.log.Warn("the API server did not take the answer", "error.message", err.Error())
	}
}

// review answers the bytes of one review with those of its answer.
func (h *Handler) review(body []byte) ([]byte, error) {
	var review admissionv1.AdmissionReview
	if err := json.Unmarshal(body, &review); err != nil {
		return nil, fmt.Errorf("the body is not an AdmissionReview: %w", err)
	}
	if review.APIVersion != admissionv1.SchemeGroupVersion.String() || review.Kind != "AdmissionReview" {
		return nil, fmt.Errorf("apiVersion %q, kind %q: this webhook reads admission.k8s.io/v1 AdmissionReview; set admissionReviewVersions: [v1]", review.APIVersion, review.Kind)
	}
	req := review.Request
	if req == nil || req.UID == "" {
		return nil, errors.New("the AdmissionReview has no request with a uid")
	}
	response, err := h.decide(req)
	if err != nil {
		return nil, err
	}
	response.UID = req.UID
	return json.Marshal(admissionv1.AdmissionReview{
		TypeMeta: metav1.TypeMeta{APIVersion: review.APIVersion, Kind: review.Kind},
		Response: response,
	})
}

func (h *Handler) decide(req *admissionv1.AdmissionRequest) (*admissionv1.AdmissionResponse, error) {
	allowed := &admissionv1.AdmissionResponse{Allowed: true}
	if req.Resource.Group != "" || req.Resource.Version != "v1" || req.Resource.Resource != "pods" || req.SubResource != "" || req.Operation != admissionv1.Create {
		h.results.WithLabelValues(resultIgnored).Inc()
		return allowed, nil
	}
	pod := &corev1.Pod{}
	if err := json.Unmarshal(req.Object.Raw, pod); err != nil {
		return nil, fmt.Errorf("the pod of request %s cannot be read: %w", req.UID, err)
	}
	ns := patch.Namespace{Name: req.Namespace, Labels: maps.Clone(h.namespaces.Labels(req.Namespace))}
	if ns.Labels == nil {
		ns.Labels = map[string]string{}
	}
	ns.Labels[patch.LabelInjection] = "enabled"
	patched, d := patch.Pod(pod, ns, h.settings)
	log := h.log.With("kubernetes.namespace", req.Namespace, "kubernetes.pod.name", podName(pod), "event.reason", d.Reason)
	tell := func(reason string) {
		if req.DryRun == nil || !*req.DryRun {
			h.events.Tell(Event{about(pod, req.Namespace), reason, d.Reason})
		}
	}
	if d.Err != nil {
		h.results.WithLabelValues(resultDenied).Inc()
		log.Warn("pod refused")
		tell(ReasonRefused)
		return refusal(d), nil //nolint:nilerr // a refusal is an answer, not a failure of ours
	}
	ops, err := patch.Diff(pod, patched)
	if err != nil {
		return nil, fmt.Errorf("the patch of request %s: %w", req.UID, err)
	}
	if string(ops) != "[]" {
		kind := admissionv1.PatchTypeJSONPatch
		allowed.PatchType, allowed.Patch = &kind, ops
	}
	for _, warning := range d.Warnings {
		allowed.Warnings = append(allowed.Warnings, "outrigger: "+warning)
	}
	switch {
	case d.Injected:
		h.results.WithLabelValues(resultInjected).Inc()
		log.Info("pod injected")
	case patch.Injected(patched):
		h.results.WithLabelValues(resultAgain).Inc()
		log.Debug("pod injected before")
	default:
		h.results.WithLabelValues(resultSkipped).Inc()
		log.Info("pod not injected")
		if d.Skipped != "" {
			tell(ReasonSkipped)
		}
	}
	return allowed, nil
}

// about is whom an Event about a new pod concerns: the pod has no name yet, or
// will never be, so its owner, or else its namespace.
func about(pod *corev1.Pod, namespace string) corev1.ObjectReference {
	for _, o := range pod.OwnerReferences {
		if o.Controller != nil && *o.Controller {
			return corev1.ObjectReference{APIVersion: o.APIVersion, Kind: o.Kind, Namespace: namespace, Name: o.Name, UID: o.UID}
		}
	}
	return corev1.ObjectReference{APIVersion: "v1", Kind: "Namespace", Namespace: namespace, Name: namespace}
}

func refusal(d patch.Decision) *admissionv1.AdmissionResponse {
	return &admissionv1.AdmissionResponse{Result: &metav1.Status{
		Status: metav1.StatusFailure, Code: http.StatusUnprocessableEntity, Reason: metav1.StatusReasonInvalid,
		Message: "outrigger: " + d.Err.Error(),
	}}
}

func podName(pod *corev1.Pod) string {
	if pod.Name == "" {
		return pod.GenerateName + "*" // the API server draws the rest later
	}
	return pod.Name
}
