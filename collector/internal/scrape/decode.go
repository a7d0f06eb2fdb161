package scrape

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"google.golang.org/protobuf/proto"
)

var errContentType = errors.New("the target must say what it sends: text/plain; version=0.0.4, application/openmetrics-text or delimited protobuf")

// decode reads a whole exposition; one bad line spoils it, as in Prometheus. A
// missing or unknown content type is an error and never guessed. Families come
// back sorted by name, with sorted labels and a payload that fits their type.
func decode(body []byte, contentType string) ([]*dto.MetricFamily, error) {
	format := expfmt.ResponseFormat(http.Header{"Content-Type": {contentType}})
	if format == expfmt.FmtUnknown {
		return nil, fmt.Errorf("content type %q is not an exposition format: %w", contentType, errContentType)
	}
	// All UTF-8 names are valid, whatever escaping was negotiated.
	format = format.WithEscapingScheme(model.NoEscaping)
	if format.FormatType() == expfmt.TypeProtoDelim {
		if err := checkFraming(body); err != nil {
			return nil, err
		}
	}
	var families []*dto.MetricFamily
	dec := expfmt.NewDecoder(bytes.NewReader(body), format)
	for {
		f := &dto.MetricFamily{}
		err := dec.Decode(f)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("exposition (%s): %w", contentType, err)
		}
		families = append(families, f)
	}
	// Not while decoding: the text decoder hands out what precedes a bad line,
	// half a sample included, before it tells of the line.
	for _, f := range families {
		if err := check(f); err != nil {
			return nil, fmt.Errorf("exposition (%s): %w", contentType, err)
		}
	}
	slices.SortStableFunc(families, compareFamilies)
	return families, nil
}

// checkFraming refuses a message whose announced length is not there: the
// decoder would allocate it first.
func checkFraming(body []byte) error {
	for off := 0; off < len(body); {
		n, w := binary.Uvarint(body[off:])
		if w <= 0 || n > uint64(len(body)-off-w) {
			return fmt.Errorf("protobuf exposition is cut short or damaged at byte %d of %d", off, len(body))
		}
		off += w + int(n)
	}
	return nil
}

// check refuses what would spoil a later exposition of all targets, and sorts labels.
func check(f *dto.MetricFamily) error {
	if f.GetName() == "" {
		return errors.New("a metric family has no name")
	}
	if !utf8.ValidString(f.GetHelp()) {
		f.Help = proto.String(strings.ToValidUTF8(f.GetHelp(), "\uFFFD"))
	}
	for _, m := range f.Metric {
		var ok bool
		switch f.GetType() {
		case dto.MetricType_COUNTER:
			ok = m.Counter != nil
		case dto.MetricType_GAUGE:
			ok = m.Gauge != nil
		case dto.MetricType_UNTYPED:
			ok = m.Untyped != nil
		case dto.MetricType_SUMMARY:
			ok = m.Summary != nil
		case dto.MetricType_HISTOGRAM, dto.MetricType_GAUGE_HISTOGRAM:
			ok = m.Histogram != nil
		}
		if !ok {
			return fmt.Errorf("metric %q has a sample that is not a %s", f.GetName(), strings.ToLower(f.GetType().String()))
		}
		slices.SortFunc(m.Label, compareLabels)
		for i, l := range m.Label {
			if !utf8.ValidString(l.GetValue()) || !utf8.ValidString(l.GetName()) || l.GetName() == "" {
				return fmt.Errorf("metric %q has the label %q whose name or value %q is not UTF-8", f.GetName(), l.GetName(), l.GetValue())
			}
			if i > 0 && l.GetName() == m.Label[i-1].GetName() {
				return fmt.Errorf("metric %q has the label %q twice", f.GetName(), l.GetName())
			}
		}
	}
	return nil
}

// finish applies the target's labels, stamps the metrics and enforces the
// limit. It changes families, which the caller has just decoded. Samples and
// dropped are counted as Prometheus counts them: a bucket is a sample.
func finish(families []*dto.MetricFamily, ours []*dto.LabelPair, honor bool, limit int, at time.Time) (kept []*dto.MetricFamily, samples, dropped int) {
	stamp := proto.Int64(at.UnixMilli())
	for _, f := range families {
		metrics := f.Metric[:0]
		for _, m := range f.Metric {
			n := sampleCount(m)
			samples += n
			if samples-dropped > limit {
				dropped += n
				continue
			}
			m.Label = mergeLabels(m.Label, ours, honor)
			if m.TimestampMs == nil {
				m.TimestampMs = stamp
			}
			metrics = append(metrics, m)
		}
		clear(f.Metric[len(metrics):])
		f.Metric = metrics
		if len(metrics) > 0 {
			kept = append(kept, f)
		}
	}
	return kept, samples, dropped
}

func sampleCount(m *dto.Metric) int {
	switch {
	case m.Summary != nil:
		return len(m.Summary.Quantile) + 2
	case m.Histogram != nil:
		h := m.Histogram
		n := 0
		if native(h) {
			n++
		}
		if b := h.Bucket; len(b) > 0 || n == 0 {
			n += len(b) + 2
			if len(b) == 0 || !math.IsInf(b[len(b)-1].GetUpperBound(), 1) {
				n++
			}
		}
		return n
	default:
		return 1
	}
}

func native(h *dto.Histogram) bool {
	return h.Schema != nil && (h.ZeroThreshold != nil || h.ZeroCount != nil || len(h.PositiveSpan) > 0 || len(h.NegativeSpan) > 0)
}

// mergeLabels adds the target's labels to a sample's by Prometheus' rules
// (honor_labels): with honor the sample's label stays, and an explicitly empty
// one keeps ours away; without, the sample's is renamed to exported_<name>, with
// as many prefixes as it takes to be unique. Both inputs are sorted; so is the
// result.
func mergeLabels(theirs, ours []*dto.LabelPair, honor bool) []*dto.LabelPair {
	has := func(list []*dto.LabelPair, name string) bool {
		_, ok := slices.BinarySearchFunc(list, name, func(l *dto.LabelPair, n string) int { return strings.Compare(l.GetName(), n) })
		return ok
	}
	out := make([]*dto.LabelPair, 0, len(theirs)+len(ours))
	renamed := map[string]bool(nil)
	for _, l := range theirs {
		if l.GetValue() == "" {
			continue // an empty label is an absent one
		}
		if !honor && has(ours, l.GetName()) {
			name := "exported_" + l.GetName()
			for has(ours, name) || has(theirs, name) || renamed[name] {
				name = "exported_" + name
			}
			if renamed == nil {
				renamed = map[string]bool{}
			}
			renamed[name] = true
			l = &dto.LabelPair{Name: &name, Value: l.Value}
		}
		out = append(out, l)
	}
	for _, l := range ours {
		if honor && has(theirs, l.GetName()) {
			continue
		}
		out = append(out, l)
	}
	slices.SortFunc(out, compareLabels)
	return out
}

func compareLabels(a, b *dto.LabelPair) int { return strings.Compare(a.GetName(), b.GetName()) }
