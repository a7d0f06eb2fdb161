package journal

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Limits of a line.
const (
	// MaxLine bytes at most are one record, so that no reader of lines cuts it.
	MaxLine = record.MaxBody
	// maxAttributes bytes of it are attributes, and maxResource the resource. What is
	// over is left out and counted in the record's TruncatedBytes.
	maxAttributes = 256 << 10
	maxResource   = 64 << 10
	// maxShort bytes are kept of the level, the stream and the service.
	maxShort = 1024
	// maxDepth of a value; what is deeper is left out.
	maxDepth = 32
	// exact integers end here in a float64.
	exact = 1 << 53
)

// resource is a record.Resource as it is written down.
type resource struct {
	Cluster         string            `json:"cluster,omitempty"`
	Node            string            `json:"node,omitempty"`
	Namespace       string            `json:"namespace,omitempty"`
	Pod             string            `json:"pod,omitempty"`
	PodUID          string            `json:"uid,omitempty"`
	Container       string            `json:"container,omitempty"`
	Restart         int               `json:"restart,omitempty"`
	Service         string            `json:"service,omitempty"`
	Labels          map[string]string `json:"labels,omitempty"`
	WorkloadKind    string            `json:"kind,omitempty"`
	Workload        string            `json:"workload,omitempty"`
	PodIP           string            `json:"ip,omitempty"`
	ContainerID     string            `json:"cid,omitempty"`
	Image           string            `json:"image,omitempty"`
	Annotations     map[string]string `json:"annotations,omitempty"`
	NamespaceLabels map[string]string `json:"namespaceLabels,omitempty"`
}

// line is a record as it is read back.
type line struct {
	Time       *time.Time      `json:"t"`
	Observed   *time.Time      `json:"o"`
	Stream     string          `json:"stream"`
	Level      string          `json:"level"`
	TraceID    string          `json:"trace"`
	SpanID     string          `json:"span"`
	Service    string          `json:"service"`
	Truncated  int             `json:"cut"`
	Attributes map[string]any  `json:"attrs"`
	Resource   json.RawMessage `json:"res"`
	Body       *string         `json:"body"`
}

// encoder writes records down. It is not safe for concurrent use.
type encoder struct {
	keys []string
	last *record.Resource
	text []byte // of last
	cut  int    // of last
	body []byte
}

// append adds the record as one line with its end. Only what is over a limit is
// missing from it, and that is counted in it.
func (e *encoder) append(dst []byte, r *record.Record) []byte {
	start := len(dst)
	cut := r.TruncatedBytes
	dst = append(dst, '{')
	dst = stamp(dst, "t", r.Time)
	dst = stamp(dst, "o", r.Observed)
	for _, f := range [...]struct{ name, value string }{{"stream", r.Stream}, {"level", r.Level}, {"trace", r.TraceID}, {"span", r.SpanID}, {"service", r.Service}} {
		if f.value != "" {
			dst = append(append(append(dst, '"'), f.name...), `":`...)
			var n int
			dst, n = quote(dst, f.value, maxShort)
			cut += len(f.value) - n
			dst = append(dst, ',')
		}
	}
	if len(r.Attributes) > 0 {
		dst = append(dst, `"attrs":`...)
		var n int
		dst, n = e.attributes(dst, r.Attributes)
		cut += n
		dst = append(dst, ',')
	}
	if r.Resource != nil {
		dst = append(append(append(dst, `"res":`...), e.resource(r.Resource)...), ',')
		cut += e.cut
	}
	const rest = len(`"cut":,"body":""}`) + 20 + 1
	var n int
	e.body, n = quote(e.body[:0], r.Body, MaxLine-rest-(len(dst)-start))
	if cut += len(r.Body) - n; cut > 0 {
		dst = strconv.AppendInt(append(dst, `"cut":`...), int64(cut), 10)
		dst = append(dst, ',')
	}
	dst = append(append(dst, `"body":`...), e.body...)
	return append(dst, '}', '\n')
}

func stamp(dst []byte, name string, t time.Time) []byte {
	t = t.UTC()
	if y := t.Year(); t.IsZero() || y < 1 || y > 9999 { // JSON has no other years
		return dst
	}
	dst = append(append(append(dst, '"'), name...), `":"`...)
	return append(t.AppendFormat(dst, time.RFC3339Nano), `",`...)
}

// resource returns the text of a resource; neighbours mostly share one.
func (e *encoder) resource(r *record.Resource) []byte {
	if r == e.last {
		return e.text
	}
	w := resource{
		Cluster: r.Cluster, Node: r.Node, Namespace: r.Namespace, Pod: r.Pod, PodUID: r.PodUID, Container: r.Container, Restart: r.Restart, Service: r.Service, Labels: r.Labels,
		WorkloadKind: r.WorkloadKind, Workload: r.Workload, PodIP: r.PodIP, ContainerID: r.ContainerID, Image: r.Image, Annotations: r.Annotations, NamespaceLabels: r.NamespaceLabels,
	}
	e.last, e.cut = r, 0
	text, err := json.Marshal(w)
	if err == nil && len(text) > maxResource {
		whole := len(text)
		w.Labels, w.Annotations, w.NamespaceLabels = nil, nil, nil
		for _, s := range []*string{&w.Cluster, &w.Node, &w.Namespace, &w.Pod, &w.PodUID, &w.Container, &w.Service, &w.WorkloadKind, &w.Workload, &w.PodIP, &w.ContainerID, &w.Image} {
			*s = (*s)[:min(len(*s), maxShort/2)]
		}
		text, err = json.Marshal(w)
		e.cut = max(1, whole-len(text))
	}
	if err != nil { // strings and maps of them always can be
		text = []byte("{}")
	}
	e.text = text
	return text
}

// attributes writes the map by its sorted names, and returns how many bytes were
// left out.
func (e *encoder) attributes(dst []byte, m map[string]any) (_ []byte, cut int) {
	e.keys = slices.AppendSeq(e.keys[:0], maps.Keys(m))
	slices.Sort(e.keys)
	start, n := len(dst), 0
	dst = append(dst, '{')
	for _, k := range e.keys {
		before := len(dst)
		if n > 0 {
			dst = append(dst, ',')
		}
		dst, _ = quote(dst, k, 6*record.MaxName+8)
		dst = append(dst, ':')
		ok := len(k) <= record.MaxName && n < record.MaxAttributes
		if ok {
			dst, ok = value(dst, m[k], 0)
		}
		if size := len(dst) - before; !ok || len(dst)-start > maxAttributes {
			dst = dst[:before]
			cut += max(size, len(k))
			continue
		}
		n++
	}
	return append(dst, '}'), cut
}

// value writes a value as encoding/json would, and reports whether it could.
func value(dst []byte, v any, depth int) ([]byte, bool) {
	if depth > maxDepth || len(dst) > 8*MaxLine {
		return dst, false
	}
	switch v := v.(type) {
	case nil:
		return append(dst, "null"...), true
	case bool:
		return strconv.AppendBool(dst, v), true
	case string:
		out, n := quote(dst, v, maxAttributes)
		return out, n == len(v)
	case float64:
		if math.IsNaN(v) || math.IsInf(v, 0) { // JSON has none of them
			return append(strconv.AppendFloat(append(dst, '"'), v, 'g', -1, 64), '"'), true
		}
		if v == math.Trunc(v) && math.Abs(v) < exact {
			return strconv.AppendFloat(dst, v, 'f', -1, 64), true
		}
		return strconv.AppendFloat(dst, v, 'g', -1, 64), true
	case []any:
		dst = append(dst, '[')
		for i, x := range v {
			if i > 0 {
				dst = append(dst, ',')
			}
			var ok bool
			if dst, ok = value(dst, x, depth+1); !ok {
				return dst, false
			}
		}
		return append(dst, ']'), true
	case map[string]any:
		dst = append(dst, '{')
		for i, k := range slices.Sorted(maps.Keys(v)) {
			if i > 0 {
				dst = append(dst, ',')
			}
			var n int
			if dst, n = quote(dst, k, maxAttributes); n < len(k) {
				return dst, false
			}
			var ok bool
			if dst, ok = value(append(dst, ':'), v[k], depth+1); !ok {
				return dst, false
			}
		}
		return append(dst, '}'), true
	default:
		return dst, false
	}
}

const hex = "0123456789abcdef"

// quote writes s as a JSON string of at most limit bytes, and returns how many
// bytes of s are in it. A byte that is no UTF-8 becomes U+FFFD.
func quote(dst []byte, s string, limit int) (_ []byte, n int) {
	start := len(dst)
	dst = append(dst, '"')
	for n < len(s) {
		if len(dst)-start > limit-8 { // room for the longest escape and the end
			break
		}
		c := s[n]
		switch {
		case c >= utf8.RuneSelf:
			r, size := utf8.DecodeRuneInString(s[n:])
			dst = utf8.AppendRune(dst, r)
			n += size
			continue
		case c == '"' || c == '\\':
			dst = append(dst, '\\', c)
		case c == '\n':
			dst = append(dst, '\\', 'n')
		case c == '\t':
			dst = append(dst, '\\', 't')
		case c < ' ':
			dst = append(dst, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
		default:
			dst = append(dst, c)
		}
		n++
	}
	return append(dst, '"'), n
}

// maxShared resources are remembered by a Decoder.
const maxShared = 1024

// ErrMalformed is returned for a line that no Writer wrote whole: a torn one, of a
// request that was never said to be taken.
var ErrMalformed = errors.New("not a line of the collector's journal")

// Decoder reads lines back. Equal resources of its records are one pointer. The
// zero value is ready; it is not safe for concurrent use.
type Decoder struct {
	shared map[string]*record.Resource
}

// Decode reads a line, with or without its end, into r, which it changes only if
// it returns nil: all but its Origin. Observed is kept where the line has none. The
// error is an ErrMalformed. The record does not refer to the line's memory.
func (d *Decoder) Decode(text []byte, r *record.Record) error {
	var l line
	if err := json.Unmarshal(text, &l); err != nil {
		return fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if l.Body == nil {
		return fmt.Errorf("%w: it has no body", ErrMalformed)
	}
	res, err := d.resource(l.Resource)
	if err != nil {
		return err
	}
	out := record.Record{
		Observed: r.Observed, Stream: l.Stream, Body: *l.Body, Level: l.Level, TraceID: l.TraceID, SpanID: l.SpanID, Service: l.Service,
		TruncatedBytes: max(0, l.Truncated), Resource: res, Attributes: l.Attributes, Origin: r.Origin,
	}
	if l.Time != nil {
		out.Time = *l.Time
	}
	if l.Observed != nil {
		out.Observed = *l.Observed
	}
	*r = out
	return nil
}

func (d *Decoder) resource(text json.RawMessage) (*record.Resource, error) {
	if r := d.shared[string(text)]; r != nil {
		return r, nil
	}
	var w resource
	if len(text) > 0 {
		if err := json.Unmarshal(text, &w); err != nil {
			return nil, fmt.Errorf("%w: resource: %w", ErrMalformed, err)
		}
	}
	r := &record.Resource{
		Cluster: w.Cluster, Node: w.Node, Namespace: w.Namespace, Pod: w.Pod, PodUID: w.PodUID, Container: w.Container, Restart: w.Restart, Service: w.Service, Labels: w.Labels,
		WorkloadKind: w.WorkloadKind, Workload: w.Workload, PodIP: w.PodIP, ContainerID: w.ContainerID, Image: w.Image, Annotations: w.Annotations, NamespaceLabels: w.NamespaceLabels,
	}
	if d.shared == nil || len(d.shared) >= maxShared {
		d.shared = map[string]*record.Resource{}
	}
	d.shared[string(text)] = r
	return r, nil
}

// Encode returns the record as one line with its end, as a Writer writes it. It may
// be called by several goroutines.
func Encode(r *record.Record) []byte { return new(encoder).append(nil, r) }
