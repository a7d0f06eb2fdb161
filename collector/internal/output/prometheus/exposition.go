// Package prometheus offers all metrics of the node to whoever pulls them: one
// target a node, for Prometheus or anything that scrapes like it.
//
// It knows how families from many sources become one valid exposition: names
// unique, one type each, no series twice, no timestamps. It does not know where
// they come from: sources are [client.Gatherer]s, the scraper, the host metrics'
// registry and the collector's own among them. The collector's main mounts the
// handler.
//
// Prometheus must scrape it with honor_labels: true, since job and instance are
// those of the original targets. Timestamps are left out so that Prometheus'
// staleness works: a series that is not exposed any more is stale at the next
// scrape, and the scraper stops offering a silent target's series after two of
// its intervals.
package prometheus

import (
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	client "github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/proto"
)

// Limits of the handler.
const (
	MaxConcurrent = 4                // requests at once; more are answered 503
	Timeout       = 30 * time.Second // of one request; then 503
	maxReported   = 1000             // names whose conflict is logged; the metric counts all
)

// The values of outrigger_exposition_conflicts_total's label reason.
const (
	reasonUntyped   = "type_untyped"
	reasonDropped   = "type_dropped"
	reasonDuplicate = "duplicate"
)

// Options are what an Exposition needs.
type Options struct {
	Logger     *slog.Logger      // required
	Registerer client.Registerer // required
	// Sources in order of precedence: of a series offered twice the first stays.
	Sources []client.Gatherer
}

// Exposition is an [http.Handler] and a [client.Gatherer], safe for concurrent use.
type Exposition struct {
	sources   []client.Gatherer
	log       *slog.Logger
	conflicts *client.CounterVec // reason
	failures  client.Counter
	handler   http.Handler

	mu       sync.Mutex
	reported map[string]bool // names whose conflict has been logged
}

// New registers the Exposition's metrics.
func New(opts Options) (*Exposition, error) {
	e := &Exposition{
		sources: opts.Sources,
		log:     opts.Logger,
		conflicts: client.NewCounterVec(client.CounterOpts{
			Name: "outrigger_exposition_conflicts_total",
			Help: "Series that could not be exposed as their target gave them, each time they were asked for: type_untyped lost their type, type_dropped and duplicate were left out.",
		}, []string{"reason"}),
		failures: client.NewCounter(client.CounterOpts{
			Name: "outrigger_exposition_source_errors_total",
			Help: "Times a source of metrics returned an error; what it returned beside it was exposed.",
		}),
		reported: map[string]bool{},
	}
	for _, r := range []string{reasonUntyped, reasonDropped, reasonDuplicate} {
		e.conflicts.WithLabelValues(r)
	}
	for _, c := range []client.Collector{e.conflicts, e.failures} {
		if err := opts.Registerer.Register(c); err != nil {
			return nil, fmt.Errorf("prometheus output: registering metrics: %w", err)
		}
	}
	e.handler = promhttp.HandlerFor(e, promhttp.HandlerOpts{
		EnableOpenMetrics:   true, // exemplars
		MaxRequestsInFlight: MaxConcurrent,
		Timeout:             Timeout,
	})
	return e, nil
}

// ServeHTTP answers in text, OpenMetrics or protobuf, by the request's Accept.
func (e *Exposition) ServeHTTP(w http.ResponseWriter, r *http.Request) { e.handler.ServeHTTP(w, r) }

// Gather merges the sources. It never fails: a source's error is counted and
// logged, a conflict is resolved and counted. Families are sorted by name,
// series by their labels.
func (e *Exposition) Gather() ([]*dto.MetricFamily, error) {
	byName := map[string][]*dto.MetricFamily{}
	var names []string
	for _, src := range e.sources {
		families, err := src.Gather()
		if err != nil {
			e.failures.Inc()
			e.log.Warn("a source of metrics returned an error", "error.message", err.Error())
		}
		for _, f := range families {
			if byName[f.GetName()] == nil {
				names = append(names, f.GetName())
			}
			byName[f.GetName()] = append(byName[f.GetName()], f)
		}
	}
	slices.Sort(names)
	out := make([]*dto.MetricFamily, 0, len(names))
	for _, name := range names {
		f, conflicts := merge(byName[name])
		for reason, n := range conflicts {
			e.conflicts.WithLabelValues(reason).Add(float64(n))
			e.report(name, reason, n)
		}
		out = append(out, f)
	}
	return out, nil
}

func (e *Exposition) report(name, reason string, n int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	key := reason + " " + name
	if e.reported[key] || len(e.reported) >= maxReported {
		return
	}
	e.reported[key] = true
	e.log.Warn("targets disagree about a metric; rename it in one of them, or give the targets labels that tell them apart",
		"metric", name, "reason", reason, "series", n)
}

// merge makes one valid family of the families of one name, which it does not
// change. Where types differ: numbers of any kind become untyped; else the type
// with the most series stays.
func merge(families []*dto.MetricFamily) (*dto.MetricFamily, map[string]int) {
	conflicts := map[string]int{}
	kind, simple := majority(families)
	mixed := slices.ContainsFunc(families, func(f *dto.MetricFamily) bool { return f.GetType() != kind })
	if mixed && simple {
		kind = dto.MetricType_UNTYPED
	}
	out := &dto.MetricFamily{Name: families[0].Name, Type: kind.Enum()}
	type series struct {
		key    string
		metric *dto.Metric
	}
	seen := map[string]bool{}
	var all []series
	for _, f := range families {
		if f.GetType() != kind && !simple {
			conflicts[reasonDropped] += len(f.Metric)
			continue
		}
		if out.GetHelp() == "" {
			out.Help = f.Help
		}
		if out.Unit == nil {
			out.Unit = f.Unit
		}
		for _, m := range f.Metric {
			key := labelKey(m.Label)
			if seen[key] {
				conflicts[reasonDuplicate]++
				continue
			}
			seen[key] = true
			switch {
			case f.GetType() != kind:
				conflicts[reasonUntyped]++
				m = &dto.Metric{Label: m.Label, Untyped: &dto.Untyped{Value: number(m)}}
			case m.TimestampMs != nil:
				m = &dto.Metric{Label: m.Label, Gauge: m.Gauge, Counter: m.Counter, Untyped: m.Untyped, Summary: m.Summary, Histogram: m.Histogram}
			}
			all = append(all, series{key, m})
		}
	}
	slices.SortFunc(all, func(a, b series) int { return strings.Compare(a.key, b.key) })
	out.Metric = make([]*dto.Metric, len(all))
	for i, s := range all {
		out.Metric[i] = s.metric
	}
	return out, conflicts
}

// majority returns the type with the most series, the first of equals, and
// whether all types are plain numbers.
func majority(families []*dto.MetricFamily) (kind dto.MetricType, simple bool) {
	count := map[dto.MetricType]int{}
	best := -1
	simple = true
	for _, f := range families {
		count[f.GetType()] += len(f.Metric)
		switch f.GetType() {
		case dto.MetricType_COUNTER, dto.MetricType_GAUGE, dto.MetricType_UNTYPED:
		default:
			simple = false
		}
	}
	for _, f := range families {
		if n := count[f.GetType()]; n > best {
			best, kind = n, f.GetType()
		}
	}
	return kind, simple
}

func number(m *dto.Metric) *float64 {
	switch {
	case m.Counter != nil:
		return proto.Float64(m.Counter.GetValue())
	case m.Gauge != nil:
		return proto.Float64(m.Gauge.GetValue())
	default:
		return proto.Float64(m.Untyped.GetValue())
	}
}

// labelKey is injective: names and values cannot contain 0xFF, which is not UTF-8.
func labelKey(labels []*dto.LabelPair) string {
	sorted := labels
	if !slices.IsSortedFunc(labels, compareLabels) {
		sorted = slices.SortedFunc(slices.Values(labels), compareLabels)
	}
	var b strings.Builder
	for _, l := range sorted {
		b.WriteString(l.GetName())
		b.WriteByte(0xff)
		b.WriteString(l.GetValue())
		b.WriteByte(0xff)
	}
	return b.String()
}

func compareLabels(a, b *dto.LabelPair) int { return strings.Compare(a.GetName(), b.GetName()) }
