package influxdb

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	influxhttp "github.com/influxdata/influxdb-client-go/v2/api/http"

	"github.com/outrigger-mesh/outrigger/collector/internal/output"
)

// send takes batches until the queue is closed and empty. stop ends waiting: a
// batch that then fails is left in the queue. sending ends attempts.
func (s *Sink) send(stop, sending context.Context) {
	failures := 0
	for {
		b := s.queue.take(sending)
		if b == nil {
			return
		}
		settle, err := s.breaker.Allow()
		if err != nil {
			s.queue.giveBack(b)
			if !sleep(stop, s.untilHalfOpen()) {
				return
			}
			continue
		}
		v := s.attempt(sending, b)
		settle(v.breaker)
		s.note(v)
		if v.kind == kindRetry || v.kind == kindPermanent {
			s.queue.giveBack(b)
			wait := PermanentRetry
			if v.kind == kindRetry {
				wait = max(s.backoff(failures), v.retryAfter)
				failures++
			}
			if !sleep(stop, wait) {
				return
			}
			continue
		}
		failures = 0
		s.settle(b, v)
	}
}

// settle accounts for a batch that the server has judged.
func (s *Sink) settle(b *batch, v verdict) {
	switch {
	case v.kind == kindWritten:
		s.metrics.written.Add(float64(b.points))
		s.queue.giveBack()
	case v.kind == kindPartial:
		n := min(v.rejected, b.points)
		s.metrics.written.Add(float64(b.points - n))
		s.metrics.dropped(causeRejected, n)
		s.queue.giveBack()
	case b.points == 1:
		cause := causeRejected
		if v.kind == kindTooLarge {
			cause = causeTooLarge
		}
		s.metrics.dropped(cause, 1)
		s.queue.giveBack()
	case v.kind == kindBad && b.splits >= maxSplits:
		s.metrics.dropped(causeRejected, b.points)
		s.queue.giveBack()
	default:
		first, second := b.halve()
		s.queue.giveBack(first, second)
	}
}

func (s *Sink) untilHalfOpen() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	// The breaker looks at its clock a moment before ours did.
	return max(time.Until(s.openUntil), 0) + time.Millisecond
}

// backoff doubles with each failure; half of it is random so that the nodes of
// a cluster do not return together.
func (s *Sink) backoff(failures int) time.Duration {
	d := s.conf.Backoff.Initial
	for range failures {
		if d *= 2; d >= s.conf.Backoff.Max || d <= 0 {
			d = s.conf.Backoff.Max
			break
		}
	}
	return d/2 + rand.N(d/2+1)
}

// note publishes the outcome of an attempt; changes are logged, not repetitions.
func (s *Sink) note(v verdict) {
	message := ""
	if v.err != nil {
		message = v.err.Error()
	}
	s.mu.Lock()
	was := s.status
	s.status.Error, s.status.Permanent = message, v.kind == kindPermanent
	if v.kind == kindWritten || v.kind == kindPartial {
		s.status.LastWrite = time.Now()
	}
	s.mu.Unlock()
	switch {
	case message == was.Error:
	case message == "":
		s.log.Info("the database takes points again")
	case v.kind == kindPermanent:
		s.log.Error("the database refuses all points", "error.message", message)
	case v.kind == kindRetry:
		s.log.Warn("the database cannot be written to; points wait", "error.message", message)
	default:
		s.log.Warn("the database refuses points", "error.message", message)
	}
}

type kind int

const (
	kindWritten   kind = iota
	kindPartial        // all but verdict.rejected points are written
	kindBad            // some point is refused, it is not said which
	kindTooLarge       // the batch, not its points
	kindRetry          // later, as it is
	kindPermanent      // later, once a person has acted
)

type verdict struct {
	kind       kind
	rejected   int
	retryAfter time.Duration
	err        error // what to tell people; nil where all was written
	breaker    error // what to tell the breaker: set where the server is not well
}

func (s *Sink) attempt(ctx context.Context, b *batch) verdict {
	ctx, cancel := context.WithTimeout(ctx, s.conf.Timeout)
	defer cancel()
	s.tr.answer = answer{}
	// The library joins records by newlines and ours end in one.
	err := s.api.WriteRecord(ctx, strings.TrimSuffix(b.text, "\n"))
	v := classify(err, s.tr.answer, s.conf, time.Now())
	code := "none"
	if s.tr.answer.code != 0 {
		code = strconv.Itoa(s.tr.answer.code)
	}
	s.metrics.requests.WithLabelValues(code).Inc()
	return v
}

// classify reads one answer of the write API. The codes are those of InfluxDB
// 2 (400 and 422 for points it cannot take) and 3 (400 with a list of lines).
func classify(err error, a answer, conf Config, now time.Time) verdict {
	bucket := fmt.Sprintf("org %q, bucket %q at %s", conf.Org, conf.Bucket, conf.URL)
	if err == nil {
		if a.code == http.StatusNoContent {
			return verdict{kind: kindWritten}
		}
		// Whatever it is (a login page, a proxy), it has not stored points.
		return verdict{kind: kindPermanent, err: fmt.Errorf("%d for %s: the write API answers 204; check influxdb.url", a.code, bucket)}
	}
	code := a.code
	var answered *influxhttp.Error
	if code == 0 && errors.As(err, &answered) {
		code = answered.StatusCode
	}
	said := a.message()
	if said == "" {
		said = err.Error()
	}
	switch code {
	case http.StatusUnauthorized:
		remedy := "put a token into a file and name it in influxdb.tokenFile"
		if conf.TokenFile != "" {
			remedy = fmt.Sprintf("the token in influxdb.tokenFile %q is wrong or revoked; replace the file's content, no restart is needed", conf.TokenFile)
		}
		return verdict{kind: kindPermanent, err: fmt.Errorf("401 for %s: %s (%s)", bucket, remedy, said)}
	case http.StatusForbidden:
		return verdict{kind: kindPermanent, err: fmt.Errorf("403 for %s: the token may not write to this bucket; give it the write permission (%s)", bucket, said)}
	case http.StatusNotFound:
		return verdict{kind: kindPermanent, err: fmt.Errorf("404 for %s: create the bucket, or correct influxdb.org, influxdb.bucket or the path of influxdb.url (%s)", bucket, said)}
	case http.StatusRequestEntityTooLarge:
		return verdict{kind: kindTooLarge, err: fmt.Errorf("413: a batch is too large and is halved; lower influxdb.batchSize (%s)", said)}
	case http.StatusBadRequest, http.StatusUnprocessableEntity:
		if n, ok := a.rejected(); ok {
			return verdict{kind: kindPartial, rejected: n, err: fmt.Errorf("%d: %d points refused for good: %s", code, n, said)}
		}
		return verdict{kind: kindBad, err: fmt.Errorf("%d: a point is refused for good: %s", code, said)}
	case http.StatusTooManyRequests:
		// The server is well and says when to return.
		return verdict{kind: kindRetry, retryAfter: a.retryAfter(now), err: fmt.Errorf("429: %s", said)}
	}
	if code >= 300 && code < 500 && code != http.StatusRequestTimeout {
		return verdict{kind: kindPermanent, err: fmt.Errorf("%d for %s: this is not an answer of the write API; check influxdb.url (%s)", code, bucket, said)}
	}
	return verdict{kind: kindRetry, retryAfter: a.retryAfter(now), err: errors.New(said), breaker: err}
}

// answer is what the library does not hand on of an error answer.
type answer struct {
	code   int
	header http.Header
	body   []byte
}

// message is the server's sentence, on one line and of bounded length.
func (a answer) message() string {
	var doc struct {
		Message string `json:"message"`
		Error   string `json:"error"`
		Data    []struct {
			Message string `json:"error_message"`
		} `json:"data"`
	}
	text := string(a.body)
	if json.Unmarshal(a.body, &doc) == nil && doc.Message+doc.Error != "" {
		text = doc.Message + doc.Error
		if len(doc.Data) > 0 {
			text += ": " + doc.Data[0].Message
		}
	}
	text = strings.Join(strings.Fields(text), " ")
	const limit = 300
	if len(text) > limit {
		text = strings.ToValidUTF8(text[:limit], "") + "..."
	}
	return text
}

// rejected tells how many points a partial write left out, where the server
// says so: "dropped=N" in InfluxDB 2, a list of lines in 3.
func (a answer) rejected() (int, bool) {
	if !bytes.Contains(a.body, []byte("partial write")) {
		return 0, false
	}
	if m := regexp.MustCompile(`\bdropped=(\d+)`).FindSubmatch(a.body); m != nil {
		n, err := strconv.Atoi(string(m[1]))
		return n, err == nil && n > 0
	}
	var doc struct {
		Data []json.RawMessage `json:"data"`
	}
	if json.Unmarshal(a.body, &doc) == nil && len(doc.Data) > 0 {
		return len(doc.Data), true
	}
	return 0, false
}

// retryAfter reads Retry-After.
func (a answer) retryAfter(now time.Time) time.Duration {
	return min(output.RetryAfter(a.header.Get("Retry-After"), now), MaxRetryAfter)
}

// transport adds the token, which it reads anew each time, and keeps the head
// and a bounded part of an error answer, of which the library reads all and
// hands on little. Used by one goroutine at a time: the sender.
type transport struct {
	base      http.RoundTripper
	tokenFile string
	answer    answer
}

// RoundTrip implements [http.RoundTripper].
func (t *transport) RoundTrip(req *http.Request) (*http.Response, error) {
	if t.tokenFile != "" {
		token, err := os.ReadFile(t.tokenFile)
		if err != nil {
			if req.Body != nil {
				err = errors.Join(err, req.Body.Close())
			}
			return nil, fmt.Errorf("influxdb.tokenFile: %w; mount the file or correct the path", err)
		}
		req = req.Clone(req.Context())
		req.Header.Set("Authorization", "Token "+strings.TrimSpace(string(token)))
	}
	resp, err := t.base.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	t.answer = answer{code: resp.StatusCode, header: resp.Header}
	if resp.StatusCode/100 == 2 {
		return resp, nil
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
	err = errors.Join(err, resp.Body.Close())
	if err != nil {
		return nil, fmt.Errorf("reading the answer %s: %w", resp.Status, err)
	}
	t.answer.body = body
	resp.Body = io.NopCloser(bytes.NewReader(body))
	return resp, nil
}

// CloseIdleConnections lets [http.Client] and Run close what is kept open.
func (t *transport) CloseIdleConnections() {
	if c, ok := t.base.(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
}
