package otlp

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	common "go.opentelemetry.io/proto/otlp/common/v1"
	logs "go.opentelemetry.io/proto/otlp/logs/v1"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

// maxDepth of a value: what is deeper is no log record.
const maxDepth = 32

// exact integers end here in a float64; larger ones become strings.
const exact = 1 << 53

// ids returns trace and span ids of a request in JSON to what they were. OTLP
// writes them there in hex, protojson reads them as base64; the digits survive that.
func ids(d *logs.LogsData) error {
	for _, r := range d.GetResourceLogs() {
		for _, s := range r.GetScopeLogs() {
			for _, l := range s.GetLogRecords() {
				for _, id := range []struct {
					name string
					b    *[]byte
					size int
				}{{"traceId", &l.TraceId, 16}, {"spanId", &l.SpanId, 8}} {
					if len(*id.b) == 0 {
						continue
					}
					b, err := hex.DecodeString(base64.StdEncoding.EncodeToString(*id.b))
					if err != nil || len(b) != id.size {
						return fmt.Errorf("%s is not %d hex digits", id.name, 2*id.size)
					}
					*id.b = b
				}
			}
		}
	}
	return nil
}

// records returns what is in a request under our names, and how many of its
// records cannot be represented, with the reason of the first.
func (r *Receiver) records(d *logs.LogsData, now time.Time) (out []*record.Record, rejected int64, reason string) {
	for _, rl := range d.GetResourceLogs() {
		res, base := r.resource(rl)
		for _, sl := range rl.GetScopeLogs() {
			scope := sl.GetScope()
			for _, l := range sl.GetLogRecords() {
				rec, err := convert(l, scope, base, now)
				if err != nil {
					if rejected++; rejected == 1 {
						reason = err.Error()
					}
					continue
				}
				rec.Resource = res
				out = append(out, rec)
			}
		}
	}
	return out, rejected, reason
}

// workloads in the order in which they name a pod's owner.
var workloads = []struct{ key, kind string }{
	{"k8s.deployment.name", "Deployment"},
	{"k8s.statefulset.name", "StatefulSet"},
	{"k8s.daemonset.name", "DaemonSet"},
	{"k8s.cronjob.name", "CronJob"},
	{"k8s.job.name", "Job"},
	{"k8s.replicaset.name", "ReplicaSet"},
}

// resource returns the fields that a record.Resource has, and the other
// attributes. A resource that cannot be represented loses that attribute only.
func (r *Receiver) resource(rl *logs.ResourceLogs) (*record.Resource, map[string]any) {
	res := &record.Resource{Cluster: r.cfg.Cluster, Node: r.cfg.Node}
	said := map[string]string{}
	rest := map[string]any{}
	for _, kv := range rl.GetResource().GetAttributes() {
		v, err := value(kv.GetValue(), 0)
		if err != nil {
			continue
		}
		text, ok := v.(string)
		if !ok {
			if key := kv.GetKey(); key == "k8s.container.restart_count" {
				if n, ok := v.(float64); ok && n >= 0 && n < math.MaxInt32 {
					res.Restart = int(n)
				}
			} else if key == "container.image.tags" {
				if tags, ok := v.([]any); ok && len(tags) > 0 {
					said[key], _ = tags[0].(string)
				}
			} else {
				rest[name(key)] = v
			}
			continue
		}
		said[kv.GetKey()] = text
	}
	take := func(to *string, keys ...string) {
		for _, k := range keys {
			if v := said[k]; v != "" {
				*to = v
				break
			}
		}
		for _, k := range keys {
			delete(said, k)
		}
	}
	take(&res.Service, "service.name")
	take(&res.Cluster, "k8s.cluster.name")
	take(&res.Node, "k8s.node.name", "host.name")
	take(&res.Namespace, "k8s.namespace.name")
	take(&res.Pod, "k8s.pod.name")
	take(&res.PodUID, "k8s.pod.uid")
	take(&res.PodIP, "k8s.pod.ip")
	take(&res.Container, "k8s.container.name", "container.name")
	take(&res.ContainerID, "container.id")
	take(&res.Image, "container.image.name")
	tag := ""
	take(&tag, "container.image.tags", "container.image.tag")
	if tag != "" && res.Image != "" {
		res.Image += ":" + tag
	}
	for _, w := range workloads {
		if v := said[w.key]; v != "" && res.Workload == "" {
			res.WorkloadKind, res.Workload = w.kind, v
			delete(said, w.key)
		}
	}
	for k, v := range said {
		label, ok := strings.CutPrefix(k, "k8s.pod.label.")
		if !ok {
			label, ok = strings.CutPrefix(k, "k8s.pod.labels.") // what the conventions said before
		}
		if !ok {
			rest[name(k)] = v
			continue
		}
		if res.Labels == nil {
			res.Labels = map[string]string{}
		}
		res.Labels[label] = v
	}
	return res, rest
}

// names of OpenTelemetry that the Elastic Common Schema calls otherwise.
var names = map[string]string{
	"exception.type":              "error.type",
	"exception.message":           "error.message",
	"exception.stacktrace":        "error.stack_trace",
	"deployment.environment.name": "service.environment",
	"deployment.environment":      "service.environment",
	"service.instance.id":         "service.node.name",
	"event.name":                  "event.action",
	"thread.name":                 "process.thread.name",
	"thread.id":                   "process.thread.id",
	"code.function.name":          "log.origin.function",
	"code.file.path":              "log.origin.file.name",
	"code.line.number":            "log.origin.file.line",
	"k8s.namespace.name":          record.Namespace,
	"k8s.cluster.name":            record.OrchCluster,
}

// name returns the name that the Elastic Common Schema has for an attribute.
func name(key string) string {
	if n, ok := names[key]; ok {
		return n
	}
	if rest, ok := strings.CutPrefix(key, "k8s."); ok {
		return "kubernetes." + rest
	}
	return key
}

func convert(l *logs.LogRecord, scope *common.InstrumentationScope, base map[string]any, now time.Time) (*record.Record, error) {
	rec := &record.Record{Observed: now, Level: level(l)}
	at := l.GetTimeUnixNano()
	if at == 0 {
		at = l.GetObservedTimeUnixNano()
	}
	switch {
	case at > math.MaxInt64:
		return nil, fmt.Errorf("time_unix_nano %d is after the year 2262", at)
	case at > 0:
		rec.Time = time.Unix(0, int64(at)).UTC()
	default:
		rec.Time = now
	}
	// An id of another length, or of zeros, is none (W3C Trace Context).
	rec.TraceID, rec.SpanID = id(l.GetTraceId(), 16), id(l.GetSpanId(), 8)
	body, err := value(l.GetBody(), 0)
	if err != nil {
		return nil, fmt.Errorf("body: %w", err)
	}
	if rec.Body, err = text(body); err != nil {
		return nil, fmt.Errorf("body: %w", err)
	}
	attributes := make(map[string]any, len(base)+len(l.GetAttributes())+1)
	for k, v := range base {
		attributes[k] = v
	}
	if n := scope.GetName(); n != "" {
		attributes["log.logger"] = n
	}
	if n := l.GetEventName(); n != "" {
		attributes["event.action"] = n
	}
	if n := l.GetDroppedAttributesCount(); n > 0 { // by the sender
		attributes["otel.dropped_attributes_count"] = float64(n)
	}
	for _, list := range [][]*common.KeyValue{scope.GetAttributes(), l.GetAttributes()} {
		for _, kv := range list {
			v, err := value(kv.GetValue(), 0)
			if err != nil {
				return nil, fmt.Errorf("attribute %.100q: %w", kv.GetKey(), err)
			}
			if s, ok := v.(string); ok && kv.GetKey() == "log.iostream" {
				rec.Stream = s
				continue
			}
			attributes[name(kv.GetKey())] = v
		}
	}
	if len(attributes) > 0 {
		rec.Attributes = attributes
	}
	return rec, nil
}

func id(b []byte, size int) string {
	if len(b) != size {
		return ""
	}
	for _, c := range b {
		if c != 0 {
			return hex.EncodeToString(b)
		}
	}
	return ""
}

// level returns ECS' word for a severity; the text where there is no number.
func level(l *logs.LogRecord) string {
	n := int(l.GetSeverityNumber())
	if n >= 1 && n <= 24 {
		return [...]string{"trace", "debug", "info", "warn", "error", "fatal"}[(n-1)/4]
	}
	s := strings.ToLower(strings.TrimSpace(l.GetSeverityText()))
	switch s {
	case "warning":
		return "warn"
	case "err":
		return "error"
	case "critical", "crit", "panic", "emerg", "emergency", "alert":
		return "fatal"
	case "information", "notice":
		return "info"
	default:
		return s
	}
}

var errDeep = errors.New("it is nested more than " + strconv.Itoa(maxDepth) + " deep")

// value returns what encoding/json would have made of it.
func value(v *common.AnyValue, depth int) (any, error) {
	if depth > maxDepth {
		return nil, errDeep
	}
	switch v := v.GetValue().(type) {
	case *common.AnyValue_StringValue:
		return v.StringValue, nil
	case *common.AnyValue_BoolValue:
		return v.BoolValue, nil
	case *common.AnyValue_DoubleValue:
		return v.DoubleValue, nil
	case *common.AnyValue_IntValue:
		if v.IntValue > exact || v.IntValue < -exact {
			return strconv.FormatInt(v.IntValue, 10), nil
		}
		return float64(v.IntValue), nil
	case *common.AnyValue_BytesValue:
		return base64.StdEncoding.EncodeToString(v.BytesValue), nil
	case *common.AnyValue_ArrayValue:
		out := make([]any, 0, len(v.ArrayValue.GetValues()))
		for _, x := range v.ArrayValue.GetValues() {
			y, err := value(x, depth+1)
			if err != nil {
				return nil, err
			}
			out = append(out, y)
		}
		return out, nil
	case *common.AnyValue_KvlistValue:
		out := make(map[string]any, len(v.KvlistValue.GetValues()))
		for _, kv := range v.KvlistValue.GetValues() {
			y, err := value(kv.GetValue(), depth+1)
			if err != nil {
				return nil, err
			}
			out[kv.GetKey()] = y
		}
		return out, nil
	default: // empty
		return nil, nil
	}
}

// text is a body as a line: a string as it is, anything else as JSON.
func text(v any) (string, error) {
	switch v := v.(type) {
	case nil:
		return "", nil
	case string:
		return v, nil
	case float64:
		return strconv.FormatFloat(v, 'f', -1, 64), nil
	default:
		var b strings.Builder
		enc := json.NewEncoder(&b)
		enc.SetEscapeHTML(false)
		if err := enc.Encode(v); err != nil { // NaN inside
			return "", err
		}
		return strings.TrimSuffix(b.String(), "\n"), nil
	}
}

// quote writes a string in JSON.
func quote(s string) []byte {
	b, err := json.Marshal(s)
	if err != nil { // a string always can be
		return []byte(`""`)
	}
	return b
}

// encodeBinary writes the value of a gRPC header that ends in -bin.
func encodeBinary(b []byte) string { return base64.RawStdEncoding.EncodeToString(b) }
