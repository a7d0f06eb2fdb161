// Package record is what a log record is, and its limits.
//
// It is the contract between the parts of the collector and whoever writes
// records that the collector should understand (the sidecar's access log). It
// knows field names and how a record is written down for a backend; it does
// not know files, backends or Kubernetes, and imports no other package of ours.
//
// A Record is made by one goroutine and not changed once it has been handed on.
package record

import (
	"strings"
	"time"
)

// Limits of a record. What is longer is cut, marked with log.truncated_bytes,
// and counted; it is never a reason to stop reading.
const (
	MaxBody       = 1 << 20 // bytes of one joined line
	MaxAttributes = 256     // lifted out of a structured body
	MaxName       = 256     // bytes of an attribute name
)

// Record is one log line, joined and parsed.
type Record struct {
	// Time that the line itself or its runtime gave; Observed when we read it.
	Time     time.Time
	Observed time.Time
	// Stream is stdout or stderr; empty for other inputs.
	Stream string
	// Body is the line, or its message where the line was structured.
	Body string
	// Level in lower case as ECS writes it: trace, debug, info, warn, error,
	// fatal. Empty where the line does not say.
	Level   string
	TraceID string // 32 lower-case hex digits or empty
	SpanID  string // 16 lower-case hex digits or empty
	// Service is what the program itself says it is called; it goes before that
	// of the Resource.
	Service string
	// TruncatedBytes is how much of the line was cut off.
	TruncatedBytes int
	// Resource is where the record comes from; never nil once it has been read. It
	// is shared by all records of a container and never changed.
	Resource *Resource
	// Attributes of a structured body by their dotted ECS names. Values are
	// string, float64, bool, nil, []any or map[string]any, as encoding/json
	// gives them.
	Attributes map[string]any
	Origin     Origin
}

// Resource is where a record comes from. All records of a container share one,
// so that an output may write it down once; whoever learns more makes another.
type Resource struct {
	Cluster   string
	Node      string
	Namespace string
	Pod       string
	PodUID    string
	Container string
	Restart   int
	// Service is the workload as users name it (ECS service.name).
	Service string
	Labels  map[string]string // of the pod

	// What only the API knows; empty until then.
	WorkloadKind string // Deployment, StatefulSet, DaemonSet, Job, CronJob, or that of the owner
	Workload     string // its name
	PodIP        string
	ContainerID  string // without the runtime's prefix
	Image        string

	// For rules; not sent.
	Annotations     map[string]string // of the pod
	NamespaceLabels map[string]string
}

// Origin is the place of a record in its file generation: half-open byte
// range [Offset, End) of all physical lines that were joined to it. File is the
// identity of the generation, and of the length where several lines were joined.
// File and Offset name the record for ever, so a record sent twice has one id.
type Origin struct {
	File   string
	Path   string
	Offset int64
	End    int64
}

// Names of the fields (Elastic Common Schema 8).
const (
	Timestamp      = "@timestamp"
	Message        = "message"
	LogLevel       = "log.level"
	TraceID        = "trace.id"
	SpanID         = "span.id"
	ServiceName    = "service.name"
	ContainerName  = "container.name"
	HostName       = "host.name"
	Namespace      = "kubernetes.namespace"
	PodName        = "kubernetes.pod.name"
	PodUID         = "kubernetes.pod.uid"
	PodIP          = "kubernetes.pod.ip"
	ContainerID    = "container.id"
	ImageName      = "container.image.name"
	KContainer     = "kubernetes.container.name"
	OrchNamespace  = "orchestrator.namespace"
	OrchCluster    = "orchestrator.cluster.name"
	StreamName     = "stream"
	FilePath       = "log.file.path"
	FileOffset     = "log.offset"
	TruncatedBytes = "log.truncated_bytes"
	EventDataset   = "event.dataset"
)

// Datasets that the sidecar writes.
const (
	DatasetAccess  = "outrigger.access"
	DatasetBreaker = "outrigger.breaker"
)

// Fields returns the record under its ECS names, dotted and flat, as every
// output and the query language see it. The map is the caller's.
func (r *Record) Fields() map[string]any {
	f := make(map[string]any, len(r.Attributes)+16)
	for k, v := range r.Attributes {
		f[k] = v
	}
	f[Timestamp] = r.Time.UTC().Format("2006-01-02T15:04:05.000000000Z07:00")
	f[Message] = r.Body
	set := func(name, value string) {
		if value != "" {
			f[name] = value
		}
	}
	set(LogLevel, r.Level)
	set(TraceID, r.TraceID)
	set(SpanID, r.SpanID)
	set(StreamName, r.Stream)
	if r.Resource != nil {
		r.Resource.fields(f)
	}
	set(ServiceName, r.Service) // the program knows best what it is
	set(FilePath, r.Origin.Path)
	if r.Origin.Path != "" {
		f[FileOffset] = r.Origin.Offset
	}
	if r.TruncatedBytes > 0 {
		f[TruncatedBytes] = r.TruncatedBytes
	}
	return f
}

// Owns reports whether the record itself has a value for a field, which goes before
// an attribute of that name, as in Fields. What a Resource has is not looked at.
func (r *Record) Owns(name string) bool {
	switch name {
	case Timestamp, Message:
		return true
	case LogLevel:
		return r.Level != ""
	case TraceID:
		return r.TraceID != ""
	case SpanID:
		return r.SpanID != ""
	case StreamName:
		return r.Stream != ""
	case ServiceName:
		return r.Service != ""
	case FilePath, FileOffset:
		return r.Origin.Path != ""
	case TruncatedBytes:
		return r.TruncatedBytes > 0
	}
	return false
}

// fields adds the fields of the resource, but for a service name that is there.
func (r *Resource) fields(f map[string]any) {
	set := func(name, value string) {
		if value != "" {
			f[name] = value
		}
	}
	if _, said := f[ServiceName]; !said {
		set(ServiceName, r.Service)
	}
	set(ContainerName, r.Container)
	set(ContainerID, r.ContainerID)
	set(ImageName, r.Image)
	set(HostName, r.Node)
	set(Namespace, r.Namespace)
	set(PodName, r.Pod)
	set(PodUID, r.PodUID)
	set(PodIP, r.PodIP)
	set(KContainer, r.Container)
	set(OrchNamespace, r.Namespace)
	set(OrchCluster, r.Cluster)
	if r.Workload != "" && r.WorkloadKind != "" {
		set("kubernetes."+strings.ToLower(r.WorkloadKind)+".name", r.Workload)
	}
	for k, v := range r.Labels {
		f["kubernetes.labels."+DedotKey(k)] = v
	}
}

// DedotKey makes a label key safe as one field name: dots and slashes become
// underscores, so that app.kubernetes.io/name never collides with app.
func DedotKey(k string) string {
	return strings.NewReplacer(".", "_", "/", "_").Replace(k)
}

// Workload strips what Kubernetes adds to a workload's name to make a pod's:
// -<replica set hash>-<5 characters> of a Deployment, -<5 characters> of a
// DaemonSet or Job, -<ordinal> of a StatefulSet. Kubernetes draws those
// characters from an alphabet without vowels, which tells them from words.
func Workload(pod string) string {
	name, last, ok := cutLast(pod)
	if !ok {
		return pod
	}
	if digits(last) {
		return name
	}
	if len(last) != 5 || !generated(last) {
		return pod
	}
	if rest, hash, ok := cutLast(name); ok && len(hash) >= 6 && len(hash) <= 10 && generated(hash) {
		return rest
	}
	return name
}

func cutLast(s string) (before, after string, ok bool) {
	i := strings.LastIndexByte(s, '-')
	if i <= 0 || i == len(s)-1 {
		return s, "", false
	}
	return s[:i], s[i+1:], true
}

func digits(s string) bool { return strings.Trim(s, "0123456789") == "" && len(s) <= 5 }

// generated reports whether s could come from apimachinery's rand.String.
func generated(s string) bool { return strings.Trim(s, "bcdfghjklmnpqrstvwxz2456789") == "" }
