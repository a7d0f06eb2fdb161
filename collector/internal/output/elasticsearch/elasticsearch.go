// Package elasticsearch is the output to Elasticsearch 8 and 9 by the bulk API.
//
// It knows how a batch becomes one bulk request and what the answer says of
// every record. It keeps no queue and repeats nothing: one Write is one request
// to one node, and the pipeline, which calls it, owns retries, batch sizes and
// the circuit breaker. So it uses the client's low-level bulk call with the
// client's own retries switched off, and not its bulk indexer, which forgets the
// items of a failed request.
//
// A record's _id is made from its place in its file, and the operation is
// "create": a record that is sent twice is stored once, and the 409 of the second
// time is an acknowledgement. That holds within one backing index; a data stream
// that rolls over between the two attempts stores both.
package elasticsearch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	es "github.com/elastic/go-elasticsearch/v8"
	"github.com/elastic/go-elasticsearch/v8/esapi"

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
}

// New makes the output. It reads the certificates but does not connect; a server
// that is away is the first Write's matter.
func New(cfg Config, log *slog.Logger) (*Output, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	tlsConfig, err := cfg.tls()
	if err != nil {
		return nil, err
	}
	transport := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		TLSClientConfig:       tlsConfig,
		TLSHandshakeTimeout:   10 * time.Second,
		IdleConnTimeout:       60 * time.Second,
		MaxIdleConnsPerHost:   2,
		ForceAttemptHTTP2:     true,
		ResponseHeaderTimeout: cfg.Timeout,
	}
	client, err := es.NewBaseClient(es.Config{
		Addresses: cfg.Addresses, CloudID: cfg.CloudID, Transport: transport,
		DisableRetry:        true,
		CompressRequestBody: cfg.Compression == "gzip", PoolCompressor: true,
	})
	if err != nil {
		return nil, fmt.Errorf("elasticsearch: %w", err)
	}
	return &Output{cfg: cfg, log: log, client: client, transport: transport}, nil
}

// Kind returns "elasticsearch".
func (*Output) Kind() string { return "elasticsearch" }

// Traits say that there is one Write at a time.
func (*Output) Traits() output.Traits { return output.Traits{Concurrency: 1} }

// Close closes the idle connections.
func (o *Output) Close() error {
	o.transport.CloseIdleConnections()
	return nil
}

// Write sends the batch as one bulk request.
func (o *Output) Write(ctx context.Context, batch []*record.Record) output.Result {
	body, sent, rejected := o.encode(batch)
	if len(sent) == 0 {
		return output.Result{Rejected: rejected}
	}
	header, err := o.cfg.authorization()
	if err != nil {
		return output.Result{Err: err, Permanent: true}
	}
	ctx, cancel := context.WithTimeout(ctx, o.cfg.Timeout)
	defer cancel()
	req := esapi.BulkRequest{
		Body: body, Pipeline: o.cfg.Pipeline, Header: http.Header{"Content-Type": {"application/x-ndjson"}},
		// The rest of the answer repeats what was sent.
		FilterPath: []string{"errors", "items.*.status", "items.*.error.type", "items.*.error.reason", "items.*.error.caused_by.reason"},
	}
	if header != "" {
		req.Header.Set("Authorization", header)
	}
	resp, err := req.Do(ctx, o.client)
	if err != nil {
		// The client asks for a header that every Elasticsearch sends.
		unknown := strings.Contains(err.Error(), "not Elasticsearch")
		return output.Result{Err: fmt.Errorf("elasticsearch: %w", err), Permanent: unknown}
	}
	defer func() { _ = resp.Body.Close() }() // read to its end or given up
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return o.failed(resp)
	}
	result, err := o.verdicts(io.LimitReader(resp.Body, maxAnswer), sent)
	if err != nil {
		return output.Result{Err: fmt.Errorf("elasticsearch: %w", err)}
	}
	if result.Err == nil {
		result.Rejected = append(rejected, result.Rejected...)
	}
	return result
}

// encode writes the bulk body and returns the indices of the records in it. A
// record that cannot be written down is rejected.
func (o *Output) encode(batch []*record.Record) (body *bytes.Buffer, sent []int, rejected []output.Rejection) {
	body = &bytes.Buffer{}
	enc := json.NewEncoder(body)
	enc.SetEscapeHTML(false)
	for i, r := range batch {
		fields := r.Fields()
		index := o.cfg.Index
		if *o.cfg.DataStream {
			dataset, _ := fields[record.EventDataset].(string)
			if dataset = part(dataset); dataset == "" {
				dataset = o.cfg.Dataset
			}
			fields["data_stream.type"] = "logs"
			fields["data_stream.dataset"] = dataset
			fields["data_stream.namespace"] = o.cfg.Namespace
			index = "logs-" + dataset + "-" + o.cfg.Namespace
		}
		before := body.Len()
		err := enc.Encode(action{create{Index: index, ID: id(r.Origin)}})
		if err == nil {
			err = enc.Encode(fields)
		}
		if err != nil {
			body.Truncate(before)
			rejected = append(rejected, output.Rejection{Index: i, Reason: "cannot be written as JSON: " + err.Error()})
			continue
		}
		sent = append(sent, i)
	}
	return body, sent, rejected
}

type action struct {
	Create create `json:"create"`
}

type create struct {
	Index string `json:"_index"`
	ID    string `json:"_id,omitempty"`
}

// id names a record for ever by its place: 128 bits of a hash, as text without
// characters that need escaping. A record without a place gets an id from the
// server, and is stored twice if it is sent twice.
func id(o record.Origin) string {
	if o.File == "" {
		return ""
	}
	h := sha256.New()
	var offset [8]byte
	binary.BigEndian.PutUint64(offset[:], uint64(o.Offset))
	_, _ = h.Write(offset[:]) // a hash never fails
	_, _ = io.WriteString(h, o.File)
	return base64.RawURLEncoding.EncodeToString(h.Sum(nil)[:16])
}

// answer is a bulk response. Every item has one operation, here "create".
type answer struct {
	Errors bool              `json:"errors"`
	Items  []map[string]item `json:"items"`
}

type item struct {
	Status int       `json:"status"`
	Error  itemError `json:"error"`
}

type itemError struct {
	Type     string `json:"type"`
	Reason   string `json:"reason"`
	CausedBy struct {
		Reason string `json:"reason"`
	} `json:"caused_by"`
}

func (e itemError) String() string {
	s := e.Type + ": " + e.Reason
	if e.CausedBy.Reason != "" {
		s += ": " + e.CausedBy.Reason
	}
	return shorten(s)
}

// verdicts reads a bulk response. An answer that cannot be understood is an error:
// nothing in it counts as an acknowledgement.
func (o *Output) verdicts(body io.Reader, sent []int) (output.Result, error) {
	var a answer
	if err := json.NewDecoder(body).Decode(&a); err != nil {
		return output.Result{}, fmt.Errorf("the answer to a bulk request cannot be read (%d bytes at most are): %w", maxAnswer, err)
	}
	if len(a.Items) != len(sent) {
		return output.Result{}, fmt.Errorf("the answer to a bulk request of %d items has %d", len(sent), len(a.Items))
	}
	var result output.Result
	var refused []string // reasons of items for which this collector has no right or no index
	for i, ops := range a.Items {
		it, ok := ops["create"]
		if !ok {
			return output.Result{}, fmt.Errorf("item %d of the answer to a bulk request has no \"create\"", i)
		}
		switch status := it.Status; {
		case status >= 200 && status <= 299, status == http.StatusConflict:
			// 409: an earlier attempt stored it.
		case status == http.StatusTooManyRequests || status >= 500:
			result.Retry = append(result.Retry, sent[i])
		case status == http.StatusUnauthorized || status == http.StatusForbidden || status == http.StatusNotFound:
			// The installation's fault and not the record's: keep it.
			refused = append(refused, it.Error.String())
			result.Retry = append(result.Retry, sent[i])
		case status >= 400:
			result.Rejected = append(result.Rejected, output.Rejection{Index: sent[i], Reason: fmt.Sprintf("status %d: %s", status, it.Error)})
		default:
			return output.Result{}, fmt.Errorf("item %d of the answer to a bulk request has status %d", i, status)
		}
	}
	if len(refused) == len(sent) {
		return output.Result{Permanent: true, Err: fmt.Errorf("elasticsearch: every record was refused: %s: grant auto_configure and create_doc on logs-*-* (or on the index), or create the index", refused[0])}, nil
	}
	if len(refused) > 0 {
		o.log.Warn("elasticsearch has no right or no index for some records; they are kept and sent again", "event.count", len(refused), "error.message", refused[0])
	}
	return result, nil
}

// failed judges a request that was refused as a whole.
func (o *Output) failed(resp *esapi.Response) output.Result {
	reason := reasonOf(resp)
	r := output.Result{RetryAfter: retryAfter(resp.Header.Get("Retry-After"), time.Now())}
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

// reasonOf reads the server's own words from an error response, or the beginning
// of what a proxy said.
func reasonOf(resp *esapi.Response) string {
	if resp.Body == nil {
		return "no reason given"
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxError))
	if err != nil && len(data) == 0 {
		return "the reason cannot be read: " + err.Error()
	}
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

// retryAfter reads the header of RFC 9110, section 10.2.3: seconds or a date.
func retryAfter(value string, now time.Time) time.Duration {
	if value == "" {
		return 0
	}
	if n, err := strconv.Atoi(value); err == nil {
		return max(0, time.Duration(min(n, 24*60*60))*time.Second)
	}
	if t, err := http.ParseTime(value); err == nil {
		return min(max(0, t.Sub(now)), 24*time.Hour)
	}
	return 0
}

var _ output.Output = (*Output)(nil)
