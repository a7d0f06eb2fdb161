// Package elasticsearch is the output to Elasticsearch 8 and 9 by the bulk API.
//
// It knows how a batch becomes one bulk request and what the answer says of
// every record, and which templates make Kibana good on first sight. It keeps no
// queue and repeats nothing: one Write is one bulk request to one node, and the
// pipeline, which calls it, owns retries, batch sizes and the circuit breaker. So
// it uses the client's transport with the client's own retries switched off, and
// not its bulk indexer, which forgets the items of a failed request.
//
// A record's _id is made from its place in its file, and the operation is
// "create": a record that is sent twice is stored once, and the 409 of the second
// time is an acknowledgement. That holds within one backing index; a data stream
// that rolls over between the two attempts stores both.
//
// A document is record.Fields as JSON, with differences that are there because the
// document would be refused otherwise: names that clash are moved (see names.go),
// lists of values of several kinds are lists of text, objects nested too deep are
// text, attributes over Config.MaxFields are one text in outrigger.extra, and where
// the mapping has kubernetes.labels as a flattened field the labels are one
// object under their own keys ("app.kubernetes.io/name"), so that a label can
// neither clash with another nor use up the index's limit of fields. Elsewhere
// they are fields with underscores (kubernetes.labels.app_kubernetes_io_name).
package elasticsearch

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	es "github.com/elastic/go-elasticsearch/v8"

	"github.com/outrigger-mesh/outrigger/collector/internal/output"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

const (
	maxAnswer = 32 << 20 // bytes of a bulk response that are read
	maxError  = 64 << 10 // bytes of the body of an error response
	maxReason = 1024     // bytes of a reason that is passed on
)

// Output sends records to Elasticsearch.
type Output struct {
	cfg       Config
	log       *slog.Logger
	client    *es.BaseClient
	transport *http.Transport
	encoders  chan *encoder // idle ones, at most Concurrency

	setupDone atomic.Bool
	setupMu   sync.Mutex // held while setup runs
	setupNext time.Time

	streamsMu      sync.RWMutex
	streams        map[string]*stream // by event.dataset as the logs write it
	tooManyStreams atomic.Bool

	// askFirst is the size of the smallest request whose connection broke while it
	// was sent; 0 without one. The server may have refused the size, and closed
	// before its 413 could be read: such requests wait for "100 Continue", until one
	// is taken.
	askFirst atomic.Int64

	failureStored atomic.Int64
	toldStored    atomic.Int64 // when, in Unix seconds
}

// New makes the output. It reads the certificates but does not connect; a server
// that is away is the first Write's matter.
func New(cfg Config, log *slog.Logger) (*Output, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	tlsConfig, err := cfg.files().Config("elasticsearch")
	if err != nil {
		return nil, err
	}
	transport := output.Transport(tlsConfig, cfg.Concurrency, cfg.Timeout)
	transport.ExpectContinueTimeout = time.Second
	client, err := es.NewBaseClient(es.Config{Addresses: cfg.Addresses, CloudID: cfg.CloudID, Transport: transport, DisableRetry: true})
	if err != nil {
		return nil, fmt.Errorf("elasticsearch: %w", err)
	}
	o := &Output{cfg: cfg, log: log, client: client, transport: transport, encoders: make(chan *encoder, cfg.Concurrency), streams: map[string]*stream{}}
	o.setupDone.Store(cfg.Setup == setupOff || !*cfg.DataStream)
	return o, nil
}

// Kind returns "elasticsearch".
func (*Output) Kind() string { return "elasticsearch" }

// Traits asks for as many Writes at a time as the configuration says. Order does
// not matter to Elasticsearch: readers sort by time and offset.
func (o *Output) Traits() output.Traits { return output.Traits{Concurrency: o.cfg.Concurrency} }

// FailureStored returns how many records Elasticsearch put into the failure store
// of their data stream, because no mapping took them. They count as acknowledged:
// they are kept there, with the reason, under <data stream>::failures.
func (o *Output) FailureStored() int64 { return o.failureStored.Load() }

// Close closes the idle connections.
func (o *Output) Close() error {
	o.transport.CloseIdleConnections()
	return nil
}

// Write sends the batch as one bulk request. It is safe for concurrent use.
func (o *Output) Write(ctx context.Context, batch []*record.Record) output.Result {
	ctx, cancel := context.WithTimeout(ctx, o.cfg.Timeout)
	defer cancel()
	now := time.Now()
	if not := o.ready(ctx, now); not != nil {
		return *not
	}
	o.prepare(ctx, batch, now)
	e, err := o.take()
	if err != nil {
		return output.Result{Err: err, Permanent: true}
	}
	defer o.give(e)
	rejected := e.encode(batch, o.to)
	if len(e.sent) == 0 {
		return output.Result{Rejected: rejected}
	}
	lent := &body{data: e.out.Bytes()}
	defer lent.takeBack()
	size := int64(e.out.Len())
	resp, err := o.send(ctx, lent, size)
	if err != nil {
		// The client asks for a header that every Elasticsearch sends.
		unknown := strings.Contains(err.Error(), "not Elasticsearch")
		var dial *net.OpError
		if size > 1<<20 && ctx.Err() == nil && (!errors.As(err, &dial) || dial.Op != "dial") {
			if smallest := o.askFirst.Load(); smallest == 0 || size < smallest {
				o.askFirst.Store(size)
			}
		}
		var secret *secretError
		return output.Result{Err: fmt.Errorf("elasticsearch: %w", err), Permanent: unknown || errors.As(err, &secret)}
	}
	defer func() { _ = resp.Body.Close() }() // read to its end or given up
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return o.failed(resp)
	}
	if smallest := o.askFirst.Load(); smallest > 0 && size >= smallest {
		o.askFirst.CompareAndSwap(smallest, 0) // it was not the size
	}
	all, err := readAll(&e.answer, resp.Body, maxAnswer)
	if err != nil {
		return output.Result{Err: fmt.Errorf("elasticsearch: the answer to a bulk request: %w", err)}
	}
	if !all {
		return output.Result{Err: fmt.Errorf("elasticsearch: the answer to a bulk request is longer than %d bytes: nothing in it counts: check what stands between", maxAnswer)}
	}
	v, err := read(e.answer.Bytes(), e.sent)
	if err != nil {
		return output.Result{Err: fmt.Errorf("elasticsearch: %w", err)}
	}
	o.tell(v, now)
	if v.Err == nil {
		v.Rejected = append(rejected, v.Rejected...)
	}
	return v.Result
}

// send makes the request. A body of which the server was seen to break the
// connection waits until the server has said that it wants it.
func (o *Output) send(ctx context.Context, lent *body, size int64) (*http.Response, error) {
	content, err := lent.reader()
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "/_bulk?filter_path="+url.QueryEscape(filterPath), content)
	if err != nil {
		return nil, fmt.Errorf("bulk request: %w", err)
	}
	if o.cfg.Pipeline != "" {
		req.URL.RawQuery += "&pipeline=" + url.QueryEscape(o.cfg.Pipeline)
	}
	req.ContentLength, req.GetBody = size, lent.reader
	req.Header.Set("Content-Type", "application/x-ndjson")
	if o.cfg.Compression == "gzip" {
		req.Header.Set("Content-Encoding", "gzip")
	}
	if smallest := o.askFirst.Load(); smallest > 0 && size >= smallest {
		req.Header.Set("Expect", "100-continue")
	}
	if err := o.authorize(req); err != nil {
		return nil, err
	}
	return o.client.Perform(req)
}

func (o *Output) authorize(req *http.Request) error {
	header, err := o.cfg.authorization()
	if err != nil {
		return &secretError{err}
	}
	if header != "" {
		req.Header.Set("Authorization", header)
	}
	return nil
}

// secretError is a key or password that cannot be read.
type secretError struct{ error }

func (e *secretError) Unwrap() error { return e.error }

// tell logs what a verdict says beside the records' fates.
func (o *Output) tell(v verdict, now time.Time) {
	if v.Err == nil && v.refused > 0 {
		o.log.Warn("elasticsearch has no right or no index for some records; they are kept and sent again", "event.count", v.refused, "error.message", v.why)
	}
	if v.failureStore == 0 {
		return
	}
	total := o.failureStored.Add(int64(v.failureStore))
	if last := o.toldStored.Load(); now.Unix()-last >= 60 && o.toldStored.CompareAndSwap(last, now.Unix()) { // at most once a minute
		o.log.Warn("elasticsearch put records that no mapping took into the failure store; they are kept under <data stream>::failures with the reason", "event.count", total)
	}
}

func (o *Output) take() (*encoder, error) {
	select {
	case e := <-o.encoders:
		return e, nil
	default:
		return newEncoder(o.cfg.Compression, o.cfg.CompressionLevel, o.cfg.MaxFields)
	}
}

func (o *Output) give(e *encoder) {
	e.trim()
	select {
	case o.encoders <- e:
	default:
	}
}

// failed judges a request that was refused as a whole.
func (o *Output) failed(resp *http.Response) output.Result {
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxError))
	reason := reasonOf(data)
	if err != nil && len(data) == 0 {
		reason = "the reason cannot be read: " + err.Error()
	}
	r := output.Result{RetryAfter: output.RetryAfter(resp.Header.Get("Retry-After"), time.Now())}
	remedy := ""
	switch status := resp.StatusCode; {
	case status == http.StatusRequestEntityTooLarge:
		r.TooLarge = true
		remedy = "the batch is over http.max_content_length of the server or its proxy"
	case status == http.StatusUnauthorized:
		r.Permanent = true
		remedy = "check apiKeyFile, or username and passwordFile"
	case status == http.StatusForbidden:
		r.Permanent = true
		remedy = "grant the API key or user auto_configure and create_doc on logs-*-*"
	case status == http.StatusNotFound || status == http.StatusMethodNotAllowed:
		r.Permanent = true
		remedy = "check addresses: the path after the port is kept, /_bulk is added"
	case status == http.StatusNotAcceptable:
		r.Permanent = true
		remedy = "the server is not Elasticsearch 8 or 9"
	case status >= 300 && status <= 399:
		r.Permanent = true
		remedy = "the server redirects to " + strconv.Quote(resp.Header.Get("Location")) + ": write the final address"
	case status == http.StatusTooManyRequests || status == http.StatusRequestTimeout || status >= 500:
		remedy = "the server is busy or away"
	default: // 400 and the like speak of the request, not of a record
		r.Permanent = true
		remedy = "the server does not take such requests: check pipeline and index"
	}
	r.Err = fmt.Errorf("elasticsearch: status %d: %s (%s)", resp.StatusCode, remedy, reason)
	return r
}

// reasonOf finds the server's own words in an error response, or the beginning of
// what a proxy said.
func reasonOf(data []byte) string {
	var body struct {
		Error itemError `json:"error"`
	}
	if err := json.Unmarshal(data, &body); err == nil && body.Error.Reason != "" {
		return body.Error.String()
	}
	s := strings.Join(strings.Fields(strings.ToValidUTF8(string(data), "")), " ")
	if s == "" {
		return "no reason given"
	}
	return shorten(s)
}

func shorten(s string) string {
	if len(s) <= maxReason {
		return s
	}
	return strings.ToValidUTF8(s[:maxReason], "") + "…"
}

var _ output.Output = (*Output)(nil)
