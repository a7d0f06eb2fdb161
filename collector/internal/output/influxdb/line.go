package influxdb

import (
	"math"
	"strconv"
	"time"

	dto "github.com/prometheus/client_model/go"
)

// encoder turns families into batches of line protocol.
type encoder struct {
	now       time.Time // of metrics without a timestamp
	batchSize int
	dropped   func(cause string, n int)
	emit      func(*batch)

	buf    []byte
	points int
}

func (e *encoder) family(f *dto.MetricFamily) {
	name := f.GetName()
	for _, m := range f.Metric {
		ts := e.now.UnixNano()
		if m.TimestampMs != nil {
			ts = m.GetTimestampMs() * int64(time.Millisecond)
		}
		point := func(suffix string, v float64) { e.point(name+suffix, m.Label, "", "", v, ts) }
		switch {
		case m.Counter != nil:
			point("", m.Counter.GetValue())
		case m.Gauge != nil:
			point("", m.Gauge.GetValue())
		case m.Untyped != nil:
			point("", m.Untyped.GetValue())
		case m.Summary != nil:
			for _, q := range m.Summary.Quantile {
				e.point(name, m.Label, "quantile", formatFloat(q.GetQuantile()), q.GetValue(), ts)
			}
			point("_sum", m.Summary.GetSampleSum())
			point("_count", float64(m.Summary.GetSampleCount()))
		case m.Histogram != nil:
			e.histogram(name, m, ts)
		}
	}
}

func (e *encoder) histogram(name string, m *dto.Metric, ts int64) {
	h := m.Histogram
	count := float64(h.GetSampleCount())
	if h.SampleCountFloat != nil {
		count = h.GetSampleCountFloat()
	}
	infinite := false
	for _, b := range h.Bucket {
		n := float64(b.GetCumulativeCount())
		if b.CumulativeCountFloat != nil {
			n = b.GetCumulativeCountFloat()
		}
		infinite = infinite || math.IsInf(b.GetUpperBound(), 1)
		e.point(name+"_bucket", m.Label, "le", formatFloat(b.GetUpperBound()), n, ts)
	}
	if len(h.Bucket) == 0 && h.Schema != nil {
		// Exponential buckets have no form in line protocol.
		e.dropped(causeNativeBuckets, 1)
	}
	if !infinite {
		e.point(name+"_bucket", m.Label, "le", "+Inf", count, ts)
	}
	e.point(name+"_sum", m.Label, "", "", h.GetSampleSum(), ts)
	e.point(name+"_count", m.Label, "", "", count, ts)
}

// formatFloat as the text exposition format writes it.
func formatFloat(v float64) string {
	if math.IsInf(v, 1) {
		return "+Inf"
	}
	return strconv.FormatFloat(v, 'g', -1, 64)
}

func (e *encoder) point(name string, tags []*dto.LabelPair, key, val string, v float64, ts int64) {
	if math.IsNaN(v) || math.IsInf(v, 0) {
		e.dropped(causeNotFinite, 1)
		return
	}
	start := len(e.buf)
	line, ok := appendLine(e.buf, name, tags, key, val, v, ts)
	if !ok || len(line)-start > maxLine {
		e.buf = line[:start]
		e.dropped(causeUnwritable, 1)
		return
	}
	e.buf = line
	if e.points++; e.points == e.batchSize {
		e.flush()
	}
}

func (e *encoder) flush() {
	if e.points == 0 {
		return
	}
	e.emit(&batch{text: string(e.buf), points: e.points})
	e.buf, e.points = e.buf[:0], 0
}

// appendLine writes one point, newline included. The extra tag is left out where
// its key is empty. It reports false where the name cannot be written: empty, or
// a comment to the server.
func appendLine(dst []byte, name string, tags []*dto.LabelPair, key, val string, v float64, ts int64) ([]byte, bool) {
	if name == "" || name[0] == '#' {
		return dst, false
	}
	dst = appendEscaped(dst, name, false)
	for _, l := range tags {
		dst = appendTag(dst, l.GetName(), l.GetValue())
	}
	if key != "" {
		dst = appendTag(dst, key, val)
	}
	dst = append(dst, " value="...)
	dst = strconv.AppendFloat(dst, v, 'g', -1, 64)
	dst = append(dst, ' ')
	dst = strconv.AppendInt(dst, ts, 10)
	return append(dst, '\n'), true
}

// appendTag leaves out an empty tag, which line protocol does not know, and
// renames the keys that the server keeps for itself as Prometheus renames
// labels that collide.
func appendTag(dst []byte, key, value string) []byte {
	if key == "" || value == "" {
		return dst
	}
	dst = append(dst, ',')
	if key == "time" || key == "_measurement" || key == "_field" {
		dst = append(dst, "exported_"...)
	}
	dst = appendEscaped(dst, key, true)
	dst = append(dst, '=')
	return appendEscaped(dst, value, true)
}

// appendEscaped escapes what line protocol can escape. Control
// characters cannot be escaped and are written as a programmer writes them. A
// trailing backslash would escape our separator and becomes a slash.
func appendEscaped(dst []byte, s string, equals bool) []byte {
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '\n':
			dst = append(dst, `\n`...)
		case c == '\r':
			dst = append(dst, `\r`...)
		case c == '\t':
			dst = append(dst, `\t`...)
		case c < ' ': // white space to some parsers, an end to others
			dst = append(dst, '\\', 'x', "0123456789abcdef"[c>>4], "0123456789abcdef"[c&15])
		case c == ',' || c == ' ' || c == '=' && equals:
			dst = append(dst, '\\', c)
		case c == '\\' && i == len(s)-1:
			dst = append(dst, '/')
		default:
			dst = append(dst, c)
		}
	}
	return dst
}
