// Package azuremonitor is the output to Azure Monitor (Log Analytics, formerly
// OMS) by the Logs Ingestion API.
//
// It knows the rows of a stream, the tokens of Entra and what an answer says of
// the rows. The pipeline, which calls it, owns retries, batches and the circuit
// breaker. One Write is as many calls as the service's limit of 1 MB asks for,
// one after the other, with a verdict for each; none is repeated, but for one
// whose token was refused, or which is divided to find the record at fault.
//
// The service answers before it stores, keeps no ids, and a rule's transformation
// may drop rows without a word: what it acknowledges is as much as can be known.
// A record whose answer was lost is sent, and stored, again; RecordId tells.
package azuremonitor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/klauspost/compress/gzip"

	"github.com/outrigger-mesh/outrigger/collector/internal/output"
	"github.com/outrigger-mesh/outrigger/collector/internal/output/tlsfiles"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

const (
	// maxCall is how many bytes of JSON one call may have, before compression. The
	// limit is 1 MB; whether that is 10^6 or 2^20 is not said.
	maxCall   = 1_000_000
	maxError  = 64 << 10 // bytes of an error response that are read
	maxReason = 1024     // bytes of a reason that is passed on
	version   = "2023-01-01"
)

// Output sends records to Azure Monitor.
type Output struct {
	cfg       Config
	log       *slog.Logger
	at        string
	client    *http.Client
	transport *http.Transport
	tokens    tokens
	writers   chan *writer // idle ones, at most Concurrency
	// taken is set once the service has taken a call: the configuration is right,
	// and a call that it calls bad has a bad record in it.
	taken atomic.Bool
}

// New makes the output. It reads the certificates but does not connect; a service
// that is away is the first Write's matter.
func New(cfg Config, log *slog.Logger) (*Output, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	tlsConfig, err := tlsfiles.Files{CA: cfg.CAFile}.Config("azuremonitor")
	if err != nil {
		return nil, err
	}
	transport := output.Transport(tlsConfig, cfg.Concurrency, cfg.Timeout)
	client := &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	return &Output{
		cfg: cfg, log: log, client: client, transport: transport, tokens: tokens{cfg: cfg, client: client}, writers: make(chan *writer, cfg.Concurrency),
		at: strings.TrimSuffix(cfg.DCREndpoint, "/") + "/dataCollectionRules/" + cfg.RuleID + "/streams/" + url.PathEscape(cfg.Stream) + "?api-version=" + version,
	}, nil
}

// Kind returns "azuremonitor".
func (*Output) Kind() string { return "azuremonitor" }

// Traits asks for batches of about one call.
func (o *Output) Traits() output.Traits {
	return output.Traits{Concurrency: o.cfg.Concurrency, MaxBytes: maxCall}
}

// Close closes the idle connections.
func (o *Output) Close() error {
	o.transport.CloseIdleConnections()
	return nil
}

// writer is the memory of one Write.
type writer struct {
	rows *rows
	buf  []byte
	zip  *gzip.Writer
}

// call is the rows of one request: data is a JSON array, ends says where in it the
// rows end, of what record each.
type call struct {
	data []byte // rows with a comma after each
	rows []row
}

type row struct {
	record int // index in the batch
	end    int // in data
}

// Write sends the batch in calls of at most 1 MB. It is safe for concurrent use.
func (o *Output) Write(ctx context.Context, batch []*record.Record) output.Result {
	w := o.take()
	defer o.give(w)
	calls, rejected := w.divide(batch)
	a := attempt{o: o, w: w, verdicts: make([]verdict, len(batch)), left: make([]int, len(batch))}
	for _, x := range rejected {
		a.verdicts[x.Index] = verdict{kind: isRejected, reason: x.Reason}
	}
	for _, c := range calls {
		for _, r := range c.rows {
			a.left[r.record]++
		}
	}
	for _, c := range calls {
		if !a.send(ctx, c) {
			break
		}
	}
	return a.result()
}

// divide makes the calls of a batch.
func (w *writer) divide(batch []*record.Record) (calls []call, rejected []output.Rejection) {
	var current call
	w.buf = w.buf[:0]
	finish := func(data []byte) {
		if len(data) > 0 {
			current.data = bytes.Clone(data)
			calls = append(calls, current)
			current = call{}
		}
	}
	for i, r := range batch {
		var err error
		w.buf, err = w.rows.append(w.buf, r, func(b []byte) []byte {
			start := 0
			if n := len(current.rows); n > 0 {
				start = current.rows[n-1].end
			}
			if len(b)+1 > maxCall && start > 0 { // the brackets come, the last comma goes
				finish(b[:start])
				b = b[:copy(b, b[start:])]
			}
			current.rows = append(current.rows, row{i, len(b)})
			return b
		})
		if err != nil {
			rejected = append(rejected, output.Rejection{Index: i, Reason: err.Error()})
		}
	}
	finish(w.buf)
	return calls, rejected
}

const (
	isOpen = iota // not decided: sent again
	isRejected
)

type verdict struct {
	kind   int
	reason string
}

// attempt gathers what the calls of one Write came to.
type attempt struct {
	o        *Output
	w        *writer
	verdicts []verdict
	left     []int // rows of a record that are not stored
	stored   bool  // at least one call was
	failed   output.Result
}

// send makes a call and reports whether further ones make sense.
func (a *attempt) send(ctx context.Context, c call) bool {
	status, header, reason, err := a.o.call(ctx, a.w, c.data)
	switch {
	case err != nil:
		var token *tokenError
		a.failed = output.Result{Err: err, Permanent: errors.As(err, &token) && token.permanent}
		return false
	case status >= 200 && status <= 299:
		a.stored = true
		a.o.taken.Store(true)
		for _, r := range c.rows {
			a.left[r.record]--
		}
		return true
	case status == http.StatusRequestEntityTooLarge || status == http.StatusBadRequest && a.o.taken.Load() && !config(reason):
		if len(c.rows) > 1 { // find the one at fault
			first, second := c.half()
			return a.send(ctx, first) && a.send(ctx, second)
		}
		a.verdicts[c.rows[0].record] = verdict{kind: isRejected, reason: fmt.Sprintf("status %d: %s", status, reason)}
		return true
	}
	a.failed = a.o.refused(status, header, reason)
	return false
}

// half divides a call in two.
func (c call) half() (first, second call) {
	n := len(c.rows) / 2
	at := c.rows[n-1].end
	first = call{data: c.data[:at], rows: c.rows[:n]}
	second = call{data: c.data[at:], rows: make([]row, 0, len(c.rows)-n)}
	for _, r := range c.rows[n:] {
		second.rows = append(second.rows, row{r.record, r.end - at})
	}
	return first, second
}

// result says what became of every record. A record of several rows is stored
// when all of them are.
func (a *attempt) result() output.Result {
	var r output.Result
	decided := a.stored
	for i, v := range a.verdicts {
		switch {
		case v.kind == isRejected:
			r.Rejected = append(r.Rejected, output.Rejection{Index: i, Reason: v.reason})
			decided = true
		case a.left[i] > 0:
			r.Retry = append(r.Retry, i)
		}
	}
	if a.failed.Err == nil {
		return r
	}
	if !decided {
		return a.failed
	}
	r.RetryAfter = a.failed.RetryAfter
	a.o.log.Warn("a part of a batch was not taken; it is sent again", "event.count", len(r.Retry), "error.message", a.failed.Err.Error())
	return r
}

// call makes one request; a refused token is renewed once.
func (o *Output) call(ctx context.Context, w *writer, data []byte) (status int, header http.Header, reason string, err error) {
	body := make([]byte, 0, len(data)+1)
	body = append(append(append(body, '['), data[:len(data)-1]...), ']')
	if o.cfg.Compression == "gzip" {
		var out bytes.Buffer
		w.zip.Reset(&out)
		_, _ = w.zip.Write(body) // into memory, which never fails
		_ = w.zip.Close()
		body = out.Bytes()
	}
	refused := ""
	for {
		token, err := o.tokens.get(ctx, time.Now(), refused)
		if err != nil {
			return 0, nil, "", err
		}
		status, header, reason, err = o.post(ctx, body, token)
		if err != nil || status != http.StatusUnauthorized || refused != "" {
			return status, header, reason, err
		}
		refused = token
	}
}

func (o *Output) post(ctx context.Context, body []byte, token string) (status int, header http.Header, reason string, err error) {
	ctx, cancel := context.WithTimeout(ctx, o.cfg.Timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, o.at, bytes.NewReader(body))
	if err != nil {
		return 0, nil, "", fmt.Errorf("azuremonitor: %w", err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Content-Type", "application/json")
	if o.cfg.Compression == "gzip" {
		req.Header.Set("Content-Encoding", "gzip")
	}
	resp, err := o.client.Do(req)
	if err != nil {
		return 0, nil, "", fmt.Errorf("azuremonitor: %w", err)
	}
	defer func() { _ = resp.Body.Close() }() // read to its end or given up
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxError))
	if err != nil && resp.StatusCode <= 299 {
		return 0, nil, "", fmt.Errorf("azuremonitor: the answer cannot be read: %w", err)
	}
	return resp.StatusCode, resp.Header, reasonOf(answer), nil
}

// refused judges a call that was not taken, and that another batch would not be
// either.
func (o *Output) refused(status int, header http.Header, reason string) output.Result {
	r := output.Result{RetryAfter: output.RetryAfter(header.Get("Retry-After"), time.Now())}
	remedy := ""
	switch {
	case status == http.StatusUnauthorized:
		r.Permanent = true
		remedy = "a new token was refused too: check tenantId, clientId and audience"
	case status == http.StatusForbidden:
		r.Permanent = true
		remedy = "give the identity the role Monitoring Metrics Publisher on the data collection rule; that takes up to 30 minutes to work"
	case status == http.StatusNotFound:
		r.Permanent = true
		remedy = "check dcrEndpoint, ruleId and stream"
	case status == http.StatusTooManyRequests || status == http.StatusRequestTimeout || status >= 500:
		remedy = "the service is busy or away, or the rule's limit a minute is reached"
	case status >= 300 && status <= 399:
		r.Permanent = true
		remedy = "the service redirects to " + strconv.Quote(header.Get("Location")) + ": write the final address as dcrEndpoint"
	default:
		r.Permanent = true
		remedy = "check that the rule has the stream and that it declares the columns"
	}
	r.Err = fmt.Errorf("azuremonitor: status %d: %s (%s)", status, remedy, reason)
	return r
}

// config reports whether a 400 speaks of the configuration and not of a record.
func config(reason string) bool {
	for _, code := range []string{"InvalidStream", "InvalidDcrImmutableId", "InvalidApiVersion", "MissingApiVersion"} {
		if strings.HasPrefix(reason, code) {
			return true
		}
	}
	return false
}

// reasonOf finds the service's code and words in an error response, or the
// beginning of what a proxy said.
func reasonOf(data []byte) string {
	var body struct {
		Error struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"error"`
	}
	if err := json.Unmarshal(data, &body); err == nil && body.Error.Code != "" {
		return shorten(body.Error.Code + ": " + body.Error.Message)
	}
	if s := strings.Join(strings.Fields(strings.ToValidUTF8(string(data), "")), " "); s != "" {
		return shorten(s)
	}
	return "no reason given"
}

func shorten(s string) string {
	if len(s) <= maxReason {
		return s
	}
	return strings.ToValidUTF8(s[:maxReason], "") + "…"
}

func (o *Output) take() *writer {
	select {
	case w := <-o.writers:
		return w
	default:
		zip, _ := gzip.NewWriterLevel(io.Discard, gzip.BestSpeed) // a level that exists
		return &writer{rows: newRows(), zip: zip}
	}
}

func (o *Output) give(w *writer) {
	if cap(w.buf) > 4*maxCall {
		w.buf = nil
	}
	select {
	case o.writers <- w:
	default:
	}
}

var _ output.Output = (*Output)(nil)
