package torture

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

// backend is a server that a collector sends to. Its judge gets what it stored.
type backend interface {
	// settings of our own collector's output, one line of YAML.
	settings() string
	// address for the template of another collector.
	address() string
	up() error
	down()
	set(f fault)
	// collect brings to the judge what it could not see as it came.
	collect(ctx context.Context) error
	close()
}

// maxRequest is Elasticsearch's http.max_content_length.
const maxRequest = 100 << 20

// elasticsearch is the kit's own server of Elasticsearch's bulk API. It is a
// fake, made to be as strict as the real one where collectors go wrong: it
// refuses what has no @timestamp, knows ids per index and answers 409 to one that
// it has. Nothing is stored but ids.
type elasticsearch struct {
	*gate
	judge   *judge
	proxy   *httputil.ReverseProxy // in front of a real one
	real    *url.URL
	dataset string

	mu  sync.Mutex
	ids map[string]struct{} // index + " " + id

	requests, items atomic.Int64
}

// newElasticsearch starts one. With a URL, what is not broken on purpose goes to
// the real server there, into the given dataset.
func newElasticsearch(j *judge, address, dataset string) (*elasticsearch, error) {
	e := &elasticsearch{judge: j, ids: map[string]struct{}{}, dataset: dataset}
	if address != "" {
		u, err := url.Parse(address)
		if err != nil {
			return nil, fmt.Errorf("--elasticsearch: %w", err)
		}
		e.real = u
		e.proxy = &httputil.ReverseProxy{
			Rewrite:      func(r *httputil.ProxyRequest) { r.SetURL(u) },
			ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
		}
	}
	var err error
	e.gate, err = newGate(func(l net.Listener) {
		server := &http.Server{Handler: e, ReadHeaderTimeout: time.Minute, ErrorLog: quiet()}
		_ = server.Serve(l) // it says that the listener was closed
		_ = server.Close()  // breaks what is under way
	})
	return e, err
}

func (e *elasticsearch) settings() string {
	return fmt.Sprintf("elasticsearch: {addresses: [%q], dataset: %s, timeout: 3s}", "http://"+e.addr, e.dataset)
}

func (e *elasticsearch) address() string { return "http://" + e.addr }

func (e *elasticsearch) close() { e.down() }

func (e *elasticsearch) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Elastic-Product", "Elasticsearch")
	w.Header().Set("Content-Type", "application/json")
	body, err := readBody(r, maxRequest)
	if err != nil {
		w.WriteHeader(http.StatusRequestEntityTooLarge)
		return
	}
	f, err := e.wait(r.Context())
	if err != nil {
		panic(http.ErrAbortHandler) // closes the connection
	}
	if f.mode == busy && e.requests.Add(1) > 0 {
		w.Header().Set("Retry-After", "1")
		if e.requests.Load()%2 == 0 {
			w.WriteHeader(http.StatusServiceUnavailable)
		} else {
			w.WriteHeader(http.StatusTooManyRequests)
		}
		return
	}
	if f.mode == tooLarge && len(body) > f.limit {
		w.WriteHeader(http.StatusRequestEntityTooLarge)
		return
	}
	if e.proxy != nil && f.mode != busyItem && f.mode != reject {
		r.Body = io.NopCloser(bytes.NewReader(body))
		r.ContentLength = int64(len(body))
		r.Header.Del("Content-Encoding")
		if f.mode == swallow {
			e.proxy.ServeHTTP(discarding{http.Header{}}, r)
			panic(http.ErrAbortHandler)
		}
		e.proxy.ServeHTTP(w, r)
		return
	}
	switch {
	case strings.HasSuffix(r.URL.Path, "/_bulk"):
		answer := e.bulk(r.URL.Path, body, f)
		if f.mode == swallow {
			panic(http.ErrAbortHandler)
		}
		_, _ = w.Write(answer) // the collector may be gone
	case r.URL.Path == "/":
		_, _ = io.WriteString(w, `{"name":"torture","cluster_name":"torture","version":{"number":"8.19.7","build_flavor":"default"},"tagline":"You Know, for Search"}`)
	case r.URL.Path == "/_cluster/health":
		_, _ = io.WriteString(w, `{"status":"green","number_of_nodes":1}`)
	case r.Method == http.MethodGet || r.Method == http.MethodHead:
		w.WriteHeader(http.StatusNotFound)
		_, _ = io.WriteString(w, `{"error":{"type":"resource_not_found_exception","reason":"this server has no such thing"},"status":404}`)
	default:
		_, _ = io.WriteString(w, `{"acknowledged":true}`)
	}
}

// bulk takes the lines of a bulk request and returns the answer.
func (e *elasticsearch) bulk(path string, body []byte, f fault) []byte {
	now := time.Now()
	index := strings.Trim(strings.TrimSuffix(path, "/_bulk"), "/")
	failed := false
	var items bytes.Buffer
	for len(body) > 0 {
		var action []byte
		action, body, _ = bytes.Cut(body, []byte{'\n'})
		if len(bytes.TrimSpace(action)) == 0 {
			continue
		}
		var verbs map[string]struct {
			ID    string `json:"_id"`
			Index string `json:"_index"`
		}
		if err := json.Unmarshal(action, &verbs); err != nil || len(verbs) != 1 {
			return []byte(`{"error":{"type":"illegal_argument_exception","reason":"Malformed action/metadata line"},"status":400}`)
		}
		var doc []byte
		doc, body, _ = bytes.Cut(body, []byte{'\n'})
		for verb, meta := range verbs {
			if meta.Index == "" {
				meta.Index = index
			}
			n := e.items.Add(1)
			status, problem := e.item(verb, meta.Index, meta.ID, doc, f, n, now)
			failed = failed || status >= 300
			if items.Len() > 0 {
				items.WriteByte(',')
			}
			fmt.Fprintf(&items, `{%q:{"_index":%q,"_id":%q,"status":%d`, verb, meta.Index, meta.ID, status)
			if problem != "" {
				fmt.Fprintf(&items, `,"error":{"type":%q,"reason":"torture"}`, problem)
			}
			items.WriteString("}}")
		}
	}
	return fmt.Appendf(nil, `{"took":1,"errors":%t,"items":[%s]}`, failed, items.Bytes())
}

func (e *elasticsearch) item(verb, index, id string, doc []byte, f fault, n int64, now time.Time) (status int, problem string) {
	switch {
	case f.mode == busyItem && n%3 == 0:
		return http.StatusTooManyRequests, "es_rejected_execution_exception"
	case f.mode == reject && n%10 == 0:
		return http.StatusBadRequest, "document_parsing_exception"
	case verb != "create" && strings.HasPrefix(index, "logs-"):
		return http.StatusBadRequest, "illegal_argument_exception" // a data stream takes only create
	}
	var fields struct {
		Timestamp json.RawMessage `json:"@timestamp"`
		Message   *string         `json:"message"`
		Body      struct {
			Text *string `json:"text"`
		} `json:"body"`
	}
	if err := json.Unmarshal(doc, &fields); err != nil || len(fields.Timestamp) == 0 {
		return http.StatusBadRequest, "document_parsing_exception"
	}
	if id != "" {
		key := index + " " + id
		e.mu.Lock()
		_, there := e.ids[key]
		e.ids[key] = struct{}{}
		e.mu.Unlock()
		if there && verb == "create" {
			return http.StatusConflict, "version_conflict_engine_exception"
		}
		if there {
			return http.StatusOK, ""
		}
	}
	text := doc
	if fields.Message != nil {
		text = []byte(*fields.Message)
	} else if fields.Body.Text != nil {
		text = []byte(*fields.Body.Text)
	}
	e.judge.arrive(text, now)
	return http.StatusCreated, ""
}

// collect reads all of the dataset from a real server.
func (e *elasticsearch) collect(ctx context.Context) error {
	if e.real == nil {
		return nil
	}
	stream := "logs-" + e.dataset + "-default"
	ask := func(method, path string, body any) (map[string]json.RawMessage, error) {
		var text io.Reader // none where there is no body: _refresh refuses even null
		if body != nil {
			b, err := json.Marshal(body)
			if err != nil {
				return nil, err
			}
			text = bytes.NewReader(b)
		}
		req, err := http.NewRequestWithContext(ctx, method, e.real.String()+path, text)
		if err != nil {
			return nil, err
		}
		req.Header.Set("Content-Type", "application/json")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return nil, err
		}
		defer func() { _ = resp.Body.Close() }() // it was read
		if resp.StatusCode != http.StatusOK {
			return nil, fmt.Errorf("%s %s: %s", method, path, resp.Status)
		}
		var out map[string]json.RawMessage
		return out, json.NewDecoder(resp.Body).Decode(&out)
	}
	if _, err := ask(http.MethodPost, "/"+stream+"/_refresh", nil); err != nil {
		return err
	}
	answer, err := ask(http.MethodPost, "/"+stream+"/_search?scroll=1m", map[string]any{"size": 5000, "sort": []string{record.Timestamp, "log.offset"}, "_source": []string{"message"}})
	for err == nil {
		var hits struct {
			Hits []struct {
				Source struct {
					Message string `json:"message"`
				} `json:"_source"`
			} `json:"hits"`
		}
		if err := json.Unmarshal(answer["hits"], &hits); err != nil {
			return err
		}
		if len(hits.Hits) == 0 {
			return nil
		}
		for _, h := range hits.Hits {
			e.judge.arrive([]byte(h.Source.Message), time.Time{})
		}
		answer, err = ask(http.MethodPost, "/_search/scroll", map[string]any{"scroll": "1m", "scroll_id": answer["_scroll_id"]})
	}
	return err
}

// stored is how many records a real server has, from its own count.
func (e *elasticsearch) stored(ctx context.Context) (int, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, e.real.String()+"/logs-"+e.dataset+"-default/_count", nil)
	if err != nil {
		return 0, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer func() { _ = resp.Body.Close() }() // it was read
	var answer struct {
		Count int `json:"count"`
	}
	return answer.Count, json.NewDecoder(resp.Body).Decode(&answer)
}

var errTooLarge = errors.New("the body is too large")

// readBody reads a body of at most limit bytes, before and after gzip.
func readBody(r *http.Request, limit int64) ([]byte, error) {
	in := io.Reader(r.Body)
	switch r.Header.Get("Content-Encoding") {
	case "gzip":
		z, err := gzip.NewReader(in)
		if err != nil {
			return nil, err
		}
		in = z
	case "", "identity":
	default:
		return nil, errors.New("Content-Encoding " + strconv.Quote(r.Header.Get("Content-Encoding")) + " is not known here")
	}
	b, err := io.ReadAll(io.LimitReader(in, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = errTooLarge
	}
	return b, err
}

// discarding is a response that nobody gets.
type discarding struct{ header http.Header }

func (d discarding) Header() http.Header         { return d.header }
func (d discarding) Write(b []byte) (int, error) { return len(b), nil }
func (d discarding) WriteHeader(int)             {}
