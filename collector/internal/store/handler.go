package store

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/internal/query"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

const (
	defaultResults = 1000
	defaultHistory = 10 // lines before a live tail
	maxFacets      = 50
	writeTimeout   = 30 * time.Second // of a response that is being streamed
	flushEvery     = time.Second      // of a live tail without lines
)

// Handler serves the store:
//
//	GET /api/v1/logs?query=&since=10m&from=&to=&limit=&follow=true
//	GET /api/v1/facets?field=service.name&query=&since=&from=&to=
//	GET /api/v1/evidence/{id}
//
// Logs are application/x-ndjson, a record a line, its fields flat and in order:
// newest first; with follow=true the last records in the order of time and then
// those that arrive. A search that fails half way ends with a line
// {"error": "..."}; a live tail that is too slow has a line {"warning": "..."}.
// Other errors are {"error": "..."} with a status of 4xx or 503.
func (s *Store) Handler() http.Handler {
	h := &handler{store: s, searches: make(chan struct{}, MaxSearches)}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /api/v1/logs", h.logs)
	mux.HandleFunc("GET /api/v1/facets", h.facets)
	mux.HandleFunc("GET /api/v1/evidence/{id}", h.evidence)
	return mux
}

type handler struct {
	store    *Store
	searches chan struct{} // bounds the searches at once
}

func (h *handler) logs(w http.ResponseWriter, r *http.Request) {
	follow, err := boolean(r, "follow")
	if err != nil {
		fail(w, http.StatusBadRequest, err)
		return
	}
	q, err := parseQuery(r, time.Now())
	if err != nil {
		fail(w, http.StatusBadRequest, err)
		return
	}
	if follow {
		h.follow(w, r, q)
		return
	}
	if !h.enter(w) {
		return
	}
	defer h.leave()
	out := newStream(w)
	defer out.done()
	for line, err := range h.store.Search(r.Context(), q) {
		if err != nil {
			out.note("error", err)
			break
		}
		if !out.line(line.JSON) {
			return
		}
	}
}

// follow sends the last lines and then the new ones. It subscribes before it
// searches, so nothing falls between; what comes both ways is sent once.
func (h *handler) follow(w http.ResponseWriter, r *http.Request, q Query) {
	if !q.To.IsZero() {
		fail(w, http.StatusBadRequest, errors.New("to: a live tail has no end: leave out to, or leave out follow"))
		return
	}
	if q.Limit == 0 {
		q.Limit = defaultHistory
	}
	f, err := h.store.subscribe(q.Expr)
	if err != nil {
		fail(w, http.StatusServiceUnavailable, err)
		return
	}
	defer h.store.unsubscribe(f)
	var history []Line
	if h.enter(w) {
		for line, searchErr := range h.store.Search(r.Context(), q) {
			if searchErr != nil {
				err = searchErr
				break
			}
			history = append(history, line)
		}
		h.leave()
	} else {
		return
	}
	out := newStream(w)
	defer out.done()
	if err != nil {
		out.note("warning", err)
	}
	sent := make(map[string]struct{}, len(history)) // by day and id
	slices.Reverse(history)
	for _, line := range history {
		sent[line.key()] = struct{}{}
		if !out.line(line.JSON) {
			return
		}
	}
	out.flush()
	tick := time.NewTicker(flushEvery)
	defer tick.Stop()
	for {
		select {
		case line := <-f.lines:
			if n := f.skipped.Swap(0); n > 0 {
				out.note("warning", &LaggedError{n})
			}
			if _, twice := sent[line.key()]; twice {
				delete(sent, line.key())
				continue
			}
			if !out.line(line.JSON) {
				return
			}
			if len(f.lines) == 0 {
				out.flush()
			}
		case <-tick.C:
			out.flush() // notices a reader that has gone
		case <-r.Context().Done():
			return
		case <-f.closed:
			out.note("error", ErrClosed)
			return
		}
	}
}

func (l Line) key() string {
	return l.Time.Format(time.DateOnly) + strconv.FormatInt(l.id, 36)
}

// Facets of a field: how often each value is among the newest records that match.
type facets struct {
	Field   string  `json:"field"`
	Records int     `json:"records"` // looked at
	Without int     `json:"without"` // records without the field
	Partial bool    `json:"partial"` // there are more records than were looked at
	Values  []facet `json:"values"`
}

type facet struct {
	Value string `json:"value"`
	Count int    `json:"count"`
}

func (h *handler) facets(w http.ResponseWriter, r *http.Request) {
	field := r.URL.Query().Get("field")
	if field == "" {
		fail(w, http.StatusBadRequest, errors.New("field: name the field to count, such as service.name"))
		return
	}
	q, err := parseQuery(r, time.Now())
	if err != nil {
		fail(w, http.StatusBadRequest, err)
		return
	}
	if q.Limit == 0 {
		q.Limit = MaxResults
	}
	if !h.enter(w) {
		return
	}
	defer h.leave()
	out := facets{Field: field, Values: []facet{}}
	counts := map[string]int{}
	for line, err := range h.store.Search(r.Context(), q) {
		if err != nil {
			if !errors.Is(err, context.DeadlineExceeded) {
				fail(w, http.StatusInternalServerError, err)
				return
			}
			out.Partial = true
			break
		}
		var fields map[string]any
		if err := json.Unmarshal(line.JSON, &fields); err != nil {
			fail(w, http.StatusInternalServerError, err)
			return
		}
		out.Records++
		switch v := fields[field].(type) {
		case nil:
			out.Without++
		case []any:
			for _, x := range v {
				counts[fmt.Sprint(x)]++
			}
		default:
			counts[fmt.Sprint(v)]++
		}
	}
	out.Partial = out.Partial || out.Records == q.Limit
	for _, value := range slices.SortedFunc(maps.Keys(counts), func(a, b string) int {
		return cmp.Or(counts[b]-counts[a], cmp.Compare(a, b))
	}) {
		if len(out.Values) == maxFacets {
			break
		}
		out.Values = append(out.Values, facet{value, counts[value]})
	}
	reply(w, http.StatusOK, out)
}

// evidence answers with the record of a circuit breaker's transition.
func (h *handler) evidence(w http.ResponseWriter, r *http.Request) {
	id := r.PathValue("id")
	if !h.enter(w) {
		return
	}
	defer h.leave()
	q := Query{Limit: 1, Expr: query.And{
		query.Match{Field: "outrigger.evidence.id", Value: query.Pattern{id}},
		query.Match{Field: record.EventDataset, Value: query.Pattern{record.DatasetBreaker}},
	}}
	for line, err := range h.store.Search(r.Context(), q) {
		if err != nil {
			fail(w, http.StatusInternalServerError, err)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(append(line.JSON, '\n')) // the client has gone if it fails
		return
	}
	fail(w, http.StatusNotFound, fmt.Errorf("no evidence %q is stored: it is older than retention (%s), the sidecar's log has not been read yet (try again in some seconds), or the id is not complete", id, h.store.cfg.Retention))
}

// enter takes a place among the searches, or answers 503.
func (h *handler) enter(w http.ResponseWriter) bool {
	select {
	case h.searches <- struct{}{}:
		return true
	default:
		w.Header().Set("Retry-After", "1")
		fail(w, http.StatusServiceUnavailable, fmt.Errorf("%d searches run already: try again", MaxSearches))
		return false
	}
}

func (h *handler) leave() { <-h.searches }

func parseQuery(r *http.Request, now time.Time) (Query, error) {
	values := r.URL.Query()
	for name := range values {
		switch name {
		case "query", "since", "from", "to", "limit", "follow", "field":
		default:
			return Query{}, fmt.Errorf("%s: there is no such parameter: use query, since, from, to, limit, follow", name)
		}
	}
	var q Query
	var err error
	if q.Expr, err = query.Parse(values.Get("query")); err != nil {
		return Query{}, err
	}
	for name, t := range map[string]*time.Time{"from": &q.From, "to": &q.To} {
		text := values.Get(name)
		if text == "" {
			continue
		}
		if *t, err = time.Parse(time.RFC3339Nano, text); err != nil {
			return Query{}, fmt.Errorf("%s: %q is not a time: write one such as 2026-11-23T03:00:00Z", name, text)
		}
	}
	if text := values.Get("since"); text != "" {
		d, err := time.ParseDuration(text)
		switch {
		case err != nil || d <= 0:
			return Query{}, fmt.Errorf("since: %q is not a duration: write one such as 10m or 24h", text)
		case !q.From.IsZero():
			return Query{}, errors.New("since, from: both say where to begin: leave one out")
		}
		q.From = now.Add(-d)
	}
	if !q.From.IsZero() && !q.To.IsZero() && !q.From.Before(q.To) {
		return Query{}, fmt.Errorf("from, to: %s is not before %s: exchange them", q.From.Format(time.RFC3339Nano), q.To.Format(time.RFC3339Nano))
	}
	if text := values.Get("limit"); text != "" {
		if q.Limit, err = strconv.Atoi(text); err != nil || q.Limit < 1 || q.Limit > MaxResults {
			return Query{}, fmt.Errorf("limit: %q is not a number from 1 to %d", text, MaxResults)
		}
	}
	return q, nil
}

func boolean(r *http.Request, name string) (bool, error) {
	text := r.URL.Query().Get(name)
	if text == "" {
		return false, nil
	}
	v, err := strconv.ParseBool(text)
	if err != nil {
		return false, fmt.Errorf("%s: %q is neither true nor false", name, text)
	}
	return v, nil
}

func fail(w http.ResponseWriter, status int, err error) {
	reply(w, status, map[string]string{"error": err.Error()})
}

func reply(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // the client has gone if it fails
}

// stream writes lines and gives up on a client that does not read them.
type stream struct {
	w       http.ResponseWriter
	control *http.ResponseController
	count   int
}

func newStream(w http.ResponseWriter) *stream {
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	return &stream{w: w, control: http.NewResponseController(w)}
}

func (s *stream) line(json []byte) bool {
	if s.count++; s.count%256 == 1 {
		s.deadline()
	}
	_, err := s.w.Write(append(slices.Clip(json), '\n'))
	return err == nil
}

func (s *stream) note(kind string, err error) {
	line, encodeErr := json.Marshal(map[string]string{kind: err.Error()})
	if encodeErr == nil {
		s.line(line)
	}
}

// flush sends what is written, and the headers. A writer that cannot set
// deadlines or flush (a recorder) is left to its own ways.
func (s *stream) flush() {
	s.deadline()
	_ = s.control.Flush()
}

// done flushes and takes the deadline back: the connection may live on.
func (s *stream) done() {
	s.flush()
	_ = s.control.SetWriteDeadline(time.Time{})
}

func (s *stream) deadline() { _ = s.control.SetWriteDeadline(time.Now().Add(writeTimeout)) }
