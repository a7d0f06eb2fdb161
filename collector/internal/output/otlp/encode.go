package otlp

import (
	"encoding/hex"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/outrigger-mesh/outrigger/collector/internal/output"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Limits of the encoder.
const (
	maxDepth     = 100  // of nested attributes
	maxFragments = 4096 // resources that are kept encoded
)

// Field numbers of opentelemetry.proto, version 1. Messages that the encoder writes:
// ExportLogsServiceRequest, ResourceLogs, Resource, ScopeLogs,
// InstrumentationScope, LogRecord, KeyValue, AnyValue, ArrayValue, KeyValueList.
const (
	requestResourceLogs = 1
	resourceLogsRes     = 1
	resourceLogsScopes  = 2
	resourceAttributes  = 1
	scopeLogsScope      = 1
	scopeLogsRecords    = 2
	scopeName           = 1
	logTime             = 1
	logSeverity         = 2
	logSeverityText     = 3
	logBody             = 5
	logAttributes       = 6
	logTraceID          = 9
	logSpanID           = 10
	logObserved         = 11
	keyValueKey         = 1
	keyValueValue       = 2
	anyString           = 1
	anyBool             = 2
	anyInt              = 3
	anyDouble           = 4
	anyArray            = 5
	anyKeyValues        = 6
	listValues          = 1 // of an array or a list of pairs
)

// encoder writes batches as ExportLogsServiceRequest. It allocates nothing for a
// record, once the record's resource was seen. It is for one goroutine.
type encoder struct {
	fragments map[source][]byte
	groups    []group // the first used ones
	used      int
	bySource  map[source]int
	request   []byte
	records   []byte // of the current group
	one       []byte // record
}

// source is what becomes one resource: a program can say that it is another service
// than its workload.
type source struct {
	resource *record.Resource
	service  string
}

type group struct {
	source  source
	indices []int
}

var scope = appendBytes(nil, scopeLogsScope, appendText(nil, scopeName, "outrigger"))

func newEncoder() *encoder {
	return &encoder{fragments: map[source][]byte{}, bySource: map[source]int{}}
}

// encode returns the request, which is the encoder's until the next call, and the
// indices of the records in it. A record that cannot be written down is rejected.
func (e *encoder) encode(batch []*record.Record) (request []byte, sent []int, rejected []output.Rejection) {
	e.used = 0
	clear(e.bySource)
	last := -1
	for i, r := range batch {
		s := source{r.Resource, serviceOf(r)}
		if last < 0 || e.groups[last].source != s {
			n, ok := e.bySource[s]
			if !ok {
				n = e.used
				e.used++
				if n == len(e.groups) {
					e.groups = append(e.groups, group{})
				}
				e.groups[n].source = s
				e.groups[n].indices = e.groups[n].indices[:0]
				e.bySource[s] = n
			}
			last = n
		}
		e.groups[last].indices = append(e.groups[last].indices, i)
	}
	e.request = e.request[:0]
	sent = make([]int, 0, len(batch))
	for _, g := range e.groups[:e.used] {
		e.records = e.records[:0]
		before := len(sent)
		for _, i := range g.indices {
			var err error
			if e.one, err = appendRecord(e.one[:0], batch[i]); err != nil {
				rejected = append(rejected, output.Rejection{Index: i, Reason: "cannot be written as OTLP: " + err.Error()})
				continue
			}
			e.records = appendBytes(e.records, scopeLogsRecords, e.one)
			sent = append(sent, i)
		}
		if len(sent) == before {
			continue
		}
		resource := e.fragment(g.source)
		scopes := len(scope) + len(e.records)
		e.request = protowire.AppendTag(e.request, requestResourceLogs, protowire.BytesType)
		e.request = protowire.AppendVarint(e.request, uint64(len(resource)+protowire.SizeTag(resourceLogsScopes)+protowire.SizeBytes(scopes)))
		e.request = append(e.request, resource...)
		e.request = protowire.AppendTag(e.request, resourceLogsScopes, protowire.BytesType)
		e.request = protowire.AppendVarint(e.request, uint64(scopes))
		e.request = append(e.request, scope...)
		e.request = append(e.request, e.records...)
	}
	for i := range e.groups[:e.used] {
		e.groups[i].source = source{} // keeps nothing of the batch
	}
	return e.request, sent, rejected
}

// serviceOf returns the service that the record itself names, or its resource's.
func serviceOf(r *record.Record) string {
	if r.Service != "" {
		return r.Service
	}
	if len(r.Attributes) > 0 {
		if s, ok := r.Attributes[record.ServiceName].(string); ok && s != "" {
			return s
		}
	}
	if r.Resource != nil {
		return r.Resource.Service
	}
	return ""
}

// fragment returns the resource as a field of ResourceLogs. When too many are kept,
// all are forgotten: those in use come back at once.
func (e *encoder) fragment(s source) []byte {
	if f, ok := e.fragments[s]; ok {
		return f
	}
	if len(e.fragments) >= maxFragments {
		clear(e.fragments)
	}
	f := appendBytes(nil, resourceLogsRes, appendResource(nil, s))
	e.fragments[s] = f
	return f
}

// appendResource writes the names of OpenTelemetry's semantic conventions.
func appendResource(b []byte, s source) []byte {
	set := func(name, value string) {
		if value != "" {
			b = appendAttribute(b, resourceAttributes, name, value)
		}
	}
	set("service.name", s.service)
	r := s.resource
	if r == nil {
		return b
	}
	set("k8s.cluster.name", r.Cluster)
	set("k8s.node.name", r.Node)
	set("host.name", r.Node)
	set("k8s.namespace.name", r.Namespace)
	set("k8s.pod.name", r.Pod)
	set("k8s.pod.uid", r.PodUID)
	set("k8s.pod.ip", r.PodIP)
	set("k8s.container.name", r.Container)
	if r.Container != "" {
		restart := protowire.AppendVarint(protowire.AppendTag(nil, anyInt, protowire.VarintType), uint64(r.Restart))
		b = appendBytes(b, resourceAttributes, appendBytes(appendText(nil, keyValueKey, "k8s.container.restart_count"), keyValueValue, restart))
	}
	set("container.id", r.ContainerID)
	if r.Image != "" {
		name, digest, _ := strings.Cut(r.Image, "@")
		tag := ""
		if i := strings.LastIndexByte(name, ':'); i > strings.LastIndexByte(name, '/') {
			name, tag = name[:i], name[i+1:]
		}
		set("container.image.name", name)
		list := func(name, value string) {
			item := appendBytes(nil, listValues, appendText(nil, anyString, valid(value)))
			b = appendBytes(b, resourceAttributes, appendBytes(appendText(nil, keyValueKey, name), keyValueValue, appendBytes(nil, anyArray, item)))
		}
		if tag != "" {
			list("container.image.tags", tag)
		}
		if digest != "" {
			list("container.image.repo_digests", name+"@"+digest)
		}
	}
	if r.Workload != "" && r.WorkloadKind != "" {
		set("k8s."+strings.ToLower(r.WorkloadKind)+".name", r.Workload)
	}
	for _, name := range slices.Sorted(maps.Keys(r.Labels)) {
		b = appendAttribute(b, resourceAttributes, "k8s.pod.label."+name, r.Labels[name])
	}
	return b
}

// appendRecord writes a LogRecord.
func appendRecord(b []byte, r *record.Record) ([]byte, error) {
	b = appendTime(b, logTime, r.Time)
	b = appendTime(b, logObserved, r.Observed)
	if n := severity(r.Level); n > 0 {
		b = protowire.AppendVarint(protowire.AppendTag(b, logSeverity, protowire.VarintType), n)
	}
	if r.Level != "" {
		b = appendText(b, logSeverityText, valid(r.Level))
	}
	body := valid(r.Body)
	b = protowire.AppendTag(b, logBody, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(protowire.SizeTag(anyString)+protowire.SizeBytes(len(body))))
	b = appendText(b, anyString, body)
	b = appendID(b, logTraceID, record.TraceID, r.TraceID, 16)
	b = appendID(b, logSpanID, record.SpanID, r.SpanID, 8)
	if r.Stream != "" {
		b = appendAttribute(b, logAttributes, "log.iostream", r.Stream)
	}
	if r.Origin.Path != "" {
		b = appendAttribute(b, logAttributes, "log.file.path", r.Origin.Path)
	}
	if r.TruncatedBytes > 0 {
		b = appendInt(b, logAttributes, record.TruncatedBytes, int64(r.TruncatedBytes))
	}
	for name, value := range r.Attributes {
		if owned(r, name) {
			continue
		}
		name = valid(name)
		size, err := sizeValue(value, 0)
		if err != nil {
			return b, fmt.Errorf("attribute %q: %w", shorten(name), err)
		}
		b = protowire.AppendTag(b, logAttributes, protowire.BytesType)
		b = appendPair(b, name, value, size)
	}
	return b, nil
}

// owned reports whether the record says the same in a place of its own, or has an
// attribute of that name itself.
func owned(r *record.Record, name string) bool {
	switch name {
	case record.ServiceName: // is the resource's
		s, ok := r.Attributes[name].(string)
		return r.Service != "" || ok && s != ""
	case "log.iostream":
		return r.Stream != ""
	case record.FilePath:
		return r.Origin.Path != ""
	case record.TruncatedBytes:
		return r.TruncatedBytes > 0
	case record.LogLevel:
		return r.Level != ""
	case record.TraceID:
		return r.TraceID != ""
	case record.SpanID:
		return r.SpanID != ""
	}
	return false
}

func severity(level string) uint64 {
	switch level {
	case "trace":
		return 1
	case "debug":
		return 5
	case "info":
		return 9
	case "warn":
		return 13
	case "error":
		return 17
	case "fatal":
		return 21
	}
	return 0
}

func appendTime(b []byte, number protowire.Number, t time.Time) []byte {
	if n := t.UnixNano(); !t.IsZero() && n > 0 {
		b = protowire.AppendFixed64(protowire.AppendTag(b, number, protowire.Fixed64Type), uint64(n))
	}
	return b
}

// appendID writes an id as bytes. One that is none, which a receiver would refuse,
// stays as an attribute.
func appendID(b []byte, number protowire.Number, name, id string, size int) []byte {
	if id == "" {
		return b
	}
	var raw [16]byte
	zero := [16]byte{}
	if len(id) == 2*size {
		var text [32]byte
		n := copy(text[:], id)
		if _, err := hex.Decode(raw[:size], text[:n]); err == nil && raw != zero {
			return appendBytes(b, number, raw[:size])
		}
	}
	return appendAttribute(b, logAttributes, name, id)
}

// valid makes a text UTF-8, because a receiver refuses a whole request for one that
// is not.
func valid(s string) string {
	if utf8.ValidString(s) {
		return s
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

func appendBytes(b []byte, number protowire.Number, data []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, number, protowire.BytesType), data)
}

func appendText(b []byte, number protowire.Number, s string) []byte {
	return protowire.AppendString(protowire.AppendTag(b, number, protowire.BytesType), s)
}

// appendAttribute writes a pair with a text.
func appendAttribute(b []byte, number protowire.Number, name, value string) []byte {
	name, value = valid(name), valid(value)
	value1 := protowire.SizeTag(anyString) + protowire.SizeBytes(len(value))
	b = protowire.AppendTag(b, number, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(sizePair(name, value1)))
	b = appendText(b, keyValueKey, name)
	b = protowire.AppendTag(b, keyValueValue, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(value1))
	return appendText(b, anyString, value)
}

func appendInt(b []byte, number protowire.Number, name string, n int64) []byte {
	size := protowire.SizeTag(anyInt) + protowire.SizeVarint(uint64(n))
	b = protowire.AppendTag(b, number, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(sizePair(name, size)))
	b = appendText(b, keyValueKey, name)
	b = protowire.AppendTag(b, keyValueValue, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(size))
	return protowire.AppendVarint(protowire.AppendTag(b, anyInt, protowire.VarintType), uint64(n))
}

// sizePair is the size of a KeyValue whose value has the given size.
func sizePair(name string, value int) int {
	return protowire.SizeTag(keyValueKey) + protowire.SizeBytes(len(name)) + protowire.SizeTag(keyValueValue) + protowire.SizeBytes(value)
}

// appendPair appends a KeyValue with its length; the value has the given size.
func appendPair(b []byte, name string, v any, size int) []byte {
	b = protowire.AppendVarint(b, uint64(sizePair(name, size)))
	b = appendText(b, keyValueKey, name)
	b = protowire.AppendTag(b, keyValueValue, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(size))
	return appendValue(b, v)
}

// sizeValue returns the size of the AnyValue of what encoding/json gives.
func sizeValue(v any, depth int) (int, error) {
	if depth > maxDepth {
		return 0, fmt.Errorf("is nested more than %d deep", maxDepth)
	}
	switch v := v.(type) {
	case nil:
		return 0, nil
	case bool:
		return protowire.SizeTag(anyBool) + 1, nil
	case string:
		return protowire.SizeTag(anyString) + protowire.SizeBytes(len(valid(v))), nil
	case float64:
		return protowire.SizeTag(anyDouble) + protowire.SizeFixed64(), nil
	case int:
		return protowire.SizeTag(anyInt) + protowire.SizeVarint(uint64(v)), nil
	case int64:
		return protowire.SizeTag(anyInt) + protowire.SizeVarint(uint64(v)), nil
	case []any:
		n, err := sizeList(v, depth)
		return protowire.SizeTag(anyArray) + protowire.SizeBytes(n), err
	case map[string]any:
		n, err := sizePairs(v, depth)
		return protowire.SizeTag(anyKeyValues) + protowire.SizeBytes(n), err
	default:
		return 0, fmt.Errorf("OTLP has nothing for a Go %T", v)
	}
}

func sizeList(list []any, depth int) (total int, err error) {
	for _, x := range list {
		n, err := sizeValue(x, depth+1)
		if err != nil {
			return 0, err
		}
		total += protowire.SizeTag(listValues) + protowire.SizeBytes(n)
	}
	return total, nil
}

func sizePairs(pairs map[string]any, depth int) (total int, err error) {
	for name, x := range pairs {
		n, err := sizeValue(x, depth+1)
		if err != nil {
			return 0, err
		}
		total += protowire.SizeTag(listValues) + protowire.SizeBytes(sizePair(valid(name), n))
	}
	return total, nil
}

// appendValue appends an AnyValue that sizeValue has found fit.
func appendValue(b []byte, v any) []byte {
	switch v := v.(type) {
	case bool:
		b = protowire.AppendVarint(protowire.AppendTag(b, anyBool, protowire.VarintType), protowire.EncodeBool(v))
	case string:
		b = appendText(b, anyString, valid(v))
	case float64:
		b = protowire.AppendFixed64(protowire.AppendTag(b, anyDouble, protowire.Fixed64Type), math.Float64bits(v))
	case int:
		b = protowire.AppendVarint(protowire.AppendTag(b, anyInt, protowire.VarintType), uint64(v))
	case int64:
		b = protowire.AppendVarint(protowire.AppendTag(b, anyInt, protowire.VarintType), uint64(v))
	case []any:
		n, _ := sizeList(v, 0) // is fit
		b = protowire.AppendVarint(protowire.AppendTag(b, anyArray, protowire.BytesType), uint64(n))
		for _, x := range v {
			n, _ := sizeValue(x, 0)
			b = protowire.AppendVarint(protowire.AppendTag(b, listValues, protowire.BytesType), uint64(n))
			b = appendValue(b, x)
		}
	case map[string]any:
		n, _ := sizePairs(v, 0) // is fit
		b = protowire.AppendVarint(protowire.AppendTag(b, anyKeyValues, protowire.BytesType), uint64(n))
		for name, x := range v {
			n, _ := sizeValue(x, 0)
			b = appendPair(protowire.AppendTag(b, listValues, protowire.BytesType), valid(name), x, n)
		}
	}
	return b
}

// partial reads what an ExportLogsServiceResponse says of rejected records.
func partial(data []byte) (rejected int64, message string, err error) {
	err = fields(data, func(number protowire.Number, kind protowire.Type, value []byte, _ uint64) error {
		if number != 1 || kind != protowire.BytesType {
			return nil
		}
		return fields(value, func(number protowire.Number, kind protowire.Type, value []byte, n uint64) error {
			switch {
			case number == 1 && kind == protowire.VarintType:
				rejected = int64(n)
			case number == 2 && kind == protowire.BytesType:
				message = shorten(string(value))
			}
			return nil
		})
	})
	return rejected, message, err
}

// fields calls f for every field of a message; value is set for bytes, n for
// varints.
func fields(data []byte, f func(number protowire.Number, kind protowire.Type, value []byte, n uint64) error) error {
	for len(data) > 0 {
		number, kind, size := protowire.ConsumeTag(data)
		if size < 0 {
			return fmt.Errorf("the answer is no protobuf: %w", protowire.ParseError(size))
		}
		data = data[size:]
		var value []byte
		var n uint64
		switch kind {
		case protowire.BytesType:
			value, size = protowire.ConsumeBytes(data)
		case protowire.VarintType:
			n, size = protowire.ConsumeVarint(data)
		default:
			size = protowire.ConsumeFieldValue(number, kind, data)
		}
		if size < 0 {
			return fmt.Errorf("the answer is no protobuf: %w", protowire.ParseError(size))
		}
		data = data[size:]
		if err := f(number, kind, value, n); err != nil {
			return err
		}
	}
	return nil
}
