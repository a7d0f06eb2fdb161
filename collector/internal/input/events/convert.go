package events

import (
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

// event is an Event of events.k8s.io/v1 as far as it is used.
type event struct {
	Metadata struct {
		Name              string    `json:"name"`
		Namespace         string    `json:"namespace"`
		UID               string    `json:"uid"`
		ResourceVersion   string    `json:"resourceVersion"`
		CreationTimestamp time.Time `json:"creationTimestamp"`
	} `json:"metadata"`
	EventTime           *time.Time `json:"eventTime"`
	ReportingController string     `json:"reportingController"`
	ReportingInstance   string     `json:"reportingInstance"`
	Action              string     `json:"action"`
	Reason              string     `json:"reason"`
	Note                string     `json:"note"`
	Type                string     `json:"type"`
	Regarding           reference  `json:"regarding"`
	Related             reference  `json:"related"`
	Series              *struct {
		Count            int       `json:"count"`
		LastObservedTime time.Time `json:"lastObservedTime"`
	} `json:"series"`
	// What writers of the older API left.
	Source struct {
		Component string `json:"component"`
		Host      string `json:"host"`
	} `json:"deprecatedSource"`
	First *time.Time `json:"deprecatedFirstTimestamp"`
	Last  *time.Time `json:"deprecatedLastTimestamp"`
	Count int        `json:"deprecatedCount"`
}

type reference struct {
	Kind      string `json:"kind"`
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	UID       string `json:"uid"`
	FieldPath string `json:"fieldPath"`
}

// time is when it happened, for the last time if it did often.
func (e *event) time() time.Time {
	at := e.Metadata.CreationTimestamp
	for _, t := range []*time.Time{e.EventTime, e.First, e.Last} {
		if t != nil && t.After(at) {
			at = *t
		}
	}
	if e.Series != nil && e.Series.LastObservedTime.After(at) {
		at = e.Series.LastObservedTime
	}
	return at
}

// record is the Event under names of the Elastic Common Schema; what that has no
// name for is called kubernetes.event.*, as other shippers do.
func (in *Input) record(e *event) *record.Record {
	r := &record.Record{
		Time: e.time().UTC(), Observed: time.Now().UTC(), Body: e.Note, Level: "info",
		Resource: &record.Resource{Cluster: in.cfg.Cluster, Node: e.Source.Host, Namespace: e.Regarding.Namespace, Service: e.ReportingController},
	}
	if e.Type == "Warning" {
		r.Level = "warn"
	}
	if r.Resource.Namespace == "" { // of a node: its Events are in default
		r.Resource.Namespace = e.Metadata.Namespace
	}
	if r.Resource.Service == "" {
		r.Resource.Service = e.Source.Component
	}
	switch e.Regarding.Kind {
	case "Pod":
		r.Resource.Pod, r.Resource.PodUID = e.Regarding.Name, e.Regarding.UID
		r.Resource.Container = container(e.Regarding.FieldPath)
	case "Node":
		r.Resource.Node = e.Regarding.Name
	case "Deployment", "StatefulSet", "DaemonSet", "Job", "CronJob", "ReplicaSet":
		r.Resource.WorkloadKind, r.Resource.Workload = e.Regarding.Kind, e.Regarding.Name
	}
	count := e.Count
	if e.Series != nil {
		count = max(count, e.Series.Count)
	}
	a := map[string]any{
		record.EventDataset: Dataset, "event.kind": "event", "event.module": "kubernetes",
		// One id for each time that the Event was counted up.
		"event.id": e.Metadata.UID + "-" + e.Metadata.ResourceVersion, "kubernetes.event.count": float64(max(1, count)),
	}
	for name, v := range map[string]string{
		"event.action": e.Reason, "event.provider": r.Resource.Service, "event.type": "info", "kubernetes.event.type": e.Type, "kubernetes.event.action": e.Action, "kubernetes.event.name": e.Metadata.Name,
		"kubernetes.event.involved_object.kind": e.Regarding.Kind, "kubernetes.event.involved_object.name": e.Regarding.Name, "kubernetes.event.involved_object.uid": e.Regarding.UID,
		"kubernetes.event.involved_object.namespace": e.Regarding.Namespace, "kubernetes.event.related.kind": e.Related.Kind, "kubernetes.event.related.name": e.Related.Name,
		"kubernetes.event.reporting_instance": e.ReportingInstance,
	} {
		if v != "" {
			a[name] = v
		}
	}
	r.Attributes = a
	return r
}

// container is the name in spec.containers{name}, spec.initContainers{name}.
func container(path string) string {
	_, rest, ok := strings.Cut(path, "ontainers{")
	if name, found := strings.CutSuffix(rest, "}"); ok && found {
		return name
	}
	return ""
}
