package azuremonitor

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strconv"
	"unicode/utf8"

	"github.com/outrigger-mesh/outrigger/collector/internal/output/jsontext"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

const (
	// maxValue is how long a value may be: Azure cuts what is over 64 KB, and does
	// not say so. Longer messages are several rows.
	maxValue = 60_000
	// maxCached bounds what a writer remembers of resources and files.
	maxCached = 2048
)

// Column is one of the stream that a data collection rule must declare.
type Column struct {
	Name string `json:"name"`
	Type string `json:"type"` // of streamDeclarations
}

// Columns are what every row may have. A rule drops, without a word, what its
// stream does not declare.
//
// RecordId is the same when a record is sent twice, which happens when an answer
// is lost, since the service itself drops no duplicates:
//
//	Outrigger_CL | summarize take_any(*) by RecordId, Part
//
// A message over 60 kB is several rows of one RecordId, with Part 0, 1, ... and
// Parts their number.
var Columns = []Column{
	{"TimeGenerated", "datetime"},
	{"Message", "string"},
	{"Level", "string"},
	{"TraceId", "string"},
	{"SpanId", "string"},
	{"Service", "string"},
	{"Stream", "string"},
	{"Cluster", "string"},
	{"Node", "string"},
	{"Namespace", "string"},
	{"Pod", "string"},
	{"PodUid", "string"},
	{"Container", "string"},
	{"Image", "string"},
	{"WorkloadKind", "string"},
	{"Workload", "string"},
	{"Labels", "dynamic"},
	{"Attributes", "dynamic"},
	{"FilePath", "string"},
	{"FileOffset", "long"},
	{"TruncatedBytes", "long"},
	{"RecordId", "string"},
	{"Part", "int"},
	{"Parts", "int"},
}

// rows makes the rows of records. It belongs to one goroutine at a time.
type rows struct {
	clock     jsontext.Clock
	resources map[*record.Resource][]byte // ,"Cluster":"..." and so on
	files     map[fileKey]string          // the beginning of RecordId
	tail      []byte                      // scratch
}

type fileKey struct{ cluster, node, file string }

func newRows() *rows {
	return &rows{resources: map[*record.Resource][]byte{}, files: map[fileKey]string{}}
}

// append appends the rows of a record, with a comma after each, and calls done
// after each with what there is so far, so that it may begin a new call; done
// returns the buffer to go on with.
func (w *rows) append(b []byte, r *record.Record, done func([]byte) []byte) ([]byte, error) {
	tail, err := w.rest(w.tail[:0], r)
	w.tail = tail
	if err != nil {
		return b, err
	}
	body := r.Body
	parts := 1
	for rest := body[cut(body):]; rest != ""; parts++ {
		rest = rest[cut(rest):]
	}
	for part := range parts {
		piece := body[:cut(body)]
		body = body[len(piece):]
		b = append(b, `{"TimeGenerated":"`...)
		b = w.clock.Append(b, r.Time)
		b = jsontext.AppendString(append(b, `","Message":`...), piece)
		if parts > 1 {
			b = strconv.AppendInt(append(b, `,"Part":`...), int64(part), 10)
			b = strconv.AppendInt(append(b, `,"Parts":`...), int64(parts), 10)
		}
		b = append(b, tail...)
		b = append(b, '}', ',')
		b = done(b)
	}
	return b, nil
}

// cut returns where a message is cut so that the piece is a value and ends with a
// whole rune. Bytes that are not UTF-8 take three as U+FFFD.
func cut(s string) int {
	n := len(s)
	if n > maxValue {
		n = maxValue
		for i := range utf8.UTFMax - 1 {
			if utf8.RuneStart(s[n-i]) {
				n -= i
				break
			}
		}
	}
	if n > maxValue/3 && !utf8.ValidString(s[:n]) {
		return maxValue / 3
	}
	return n
}

// rest appends all columns but the time and the message.
func (w *rows) rest(b []byte, r *record.Record) ([]byte, error) {
	text := func(name, value string) {
		if value != "" {
			b = jsontext.AppendString(append(append(append(b, ',', '"'), name...), '"', ':'), value)
		}
	}
	text("Level", r.Level)
	text("TraceId", r.TraceID)
	text("SpanId", r.SpanID)
	text("Stream", r.Stream)
	service := r.Service
	cluster, node := "", ""
	if res := r.Resource; res != nil {
		if service == "" {
			service = res.Service
		}
		cluster, node = res.Cluster, res.Node
		fragment, ok := w.resources[res]
		if !ok {
			if len(w.resources) >= maxCached {
				clear(w.resources)
			}
			var err error
			if fragment, err = describe(res); err != nil {
				return b, err
			}
			w.resources[res] = fragment
		}
		b = append(b, fragment...)
	}
	text("Service", service)
	text("FilePath", r.Origin.Path)
	if r.Origin.Path != "" {
		b = strconv.AppendInt(append(b, `,"FileOffset":`...), r.Origin.Offset, 10)
	}
	if r.TruncatedBytes > 0 {
		b = strconv.AppendInt(append(b, `,"TruncatedBytes":`...), int64(r.TruncatedBytes), 10)
	}
	if r.Origin.File != "" {
		b = append(append(b, `,"RecordId":"`...), w.file(fileKey{cluster, node, r.Origin.File})...)
		b = append(strconv.AppendInt(append(b, '-'), r.Origin.Offset, 10), '"')
	}
	if len(r.Attributes) > 0 {
		attributes, err := json.Marshal(r.Attributes)
		if err != nil {
			return b, fmt.Errorf("cannot be written as JSON: %w", err)
		}
		if len(attributes) > maxValue {
			return b, fmt.Errorf("its attributes are %d bytes of JSON; Azure Monitor cuts values over 64 KB and does not say so", len(attributes))
		}
		b = append(append(b, `,"Attributes":`...), attributes...)
	}
	return b, nil
}

func describe(r *record.Resource) ([]byte, error) {
	var b []byte
	for _, c := range []struct{ name, value string }{
		{"Cluster", r.Cluster},
		{"Node", r.Node},
		{"Namespace", r.Namespace},
		{"Pod", r.Pod},
		{"PodUid", r.PodUID},
		{"Container", r.Container},
		{"Image", r.Image},
		{"WorkloadKind", r.WorkloadKind},
		{"Workload", r.Workload},
	} {
		if c.value != "" {
			b = jsontext.AppendString(append(b, `,"`+c.name+`":`...), c.value)
		}
	}
	if len(r.Labels) > 0 {
		labels, err := json.Marshal(r.Labels)
		if err != nil {
			return nil, fmt.Errorf("labels cannot be written as JSON: %w", err)
		}
		b = append(append(b, `,"Labels":`...), labels...)
	}
	return b, nil
}

func (w *rows) file(k fileKey) string {
	id, ok := w.files[k]
	if !ok {
		if len(w.files) >= maxCached {
			clear(w.files)
		}
		sum := sha256.Sum256([]byte(k.cluster + "\x00" + k.node + "\x00" + k.file))
		id = base64.RawURLEncoding.EncodeToString(sum[:12])
		w.files[k] = id
	}
	return id
}
