package fluentd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/fluent/fluent-logger-golang/fluent"

	"github.com/outrigger-mesh/outrigger/collector/internal/output"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// simple sends one message an event, each with a chunk id that the server
// acknowledges. The wire is fluent-logger-golang's, used where it can be trusted:
// synchronously (its queue loses events when it is full), with one attempt (its
// retries would hide the server's state from the pipeline), with deadlines on
// every write and read (without, an acknowledgement that never comes waits for
// ever), and with times of nanoseconds.
type simple struct {
	cfg    Config
	log    *slog.Logger
	tag    tag
	client *fluent.Fluent // nil while there is no connection
	used   time.Time      // when the client last had an acknowledgement
}

// Close closes the connection.
func (o *simple) Close() error { return o.disconnect() }

// Write sends the events one after the other. The first that fails ends the
// attempt: those before it are acknowledged, it and the rest are to be sent
// again. When ctx ends, Write returns after the event on its way, at most
// WriteTimeout and AckTimeout later: the library cannot be interrupted.
func (o *simple) Write(ctx context.Context, batch []*record.Record) output.Result {
	var result output.Result
	for i, r := range batch {
		err := ctx.Err()
		if err == nil {
			err = o.send(r)
		}
		var refused *encodingError
		if errors.As(err, &refused) {
			result.Rejected = append(result.Rejected, output.Rejection{Index: i, Reason: refused.Error()})
			continue
		}
		if err == nil {
			continue
		}
		if i == 0 || i == len(result.Rejected) { // nothing acknowledged
			return output.Result{Err: err}
		}
		o.log.Warn("an event was not acknowledged; it and the rest of the batch are sent again", "output.address", o.cfg.Address, "event.acknowledged", i-len(result.Rejected), "event.remaining", len(batch)-i, "error.message", err.Error())
		for j := i; j < len(batch); j++ {
			result.Retry = append(result.Retry, j)
		}
		return result
	}
	return result
}

// encodingError: an event that msgpack cannot hold.
type encodingError struct{ err error }

func (e *encodingError) Error() string {
	s := e.err.Error()
	return "cannot be written as msgpack: " + shorten(s)
}

// send sends one event and waits for its acknowledgement. After an error there
// is no connection: what the server would still answer belongs to no event.
func (o *simple) send(r *record.Record) error {
	if o.client != nil && time.Since(o.used) > o.cfg.IdleTimeout {
		if err := o.disconnect(); err != nil {
			return err
		}
	}
	if o.client == nil {
		if err := o.connect(); err != nil {
			return err
		}
	}
	t := r.Time
	if t.IsZero() {
		t = r.Observed
	}
	// The library takes the record apart only for other kinds of maps.
	err := o.client.EncodeAndPostData(o.tag.of(r), t, r.Fields())
	if err == nil {
		o.used = time.Now()
		return nil
	}
	if strings.Contains(err.Error(), "EncodeAndPostData: can't convert") { // its text repeats the whole record
		if inner := errors.Unwrap(err); inner != nil {
			err = inner
		}
		return &encodingError{err}
	}
	err = fmt.Errorf("fluentd %s: no acknowledgement within %s (writeTimeout %s), a connection that broke, or an answer that was none: check that the server runs, is not overloaded and asks for no shared key: %w",
		o.cfg.Address, o.cfg.AckTimeout, o.cfg.WriteTimeout, err)
	return errors.Join(err, o.disconnect())
}

func (o *simple) connect() error {
	network, target, err := endpoint(o.cfg.Address)
	if err != nil {
		return err
	}
	host, port := target, 0
	if network == "tcp" {
		var text string
		if host, text, err = net.SplitHostPort(target); err == nil {
			port, err = strconv.Atoi(text)
		}
		if err != nil {
			return fmt.Errorf("fluentd %s: %w", target, err)
		}
		if strings.Contains(host, ":") { // the library joins host and port by a colon
			host = "[" + host + "]"
		}
		if o.cfg.TLS {
			network = "tls"
		}
	}
	c := fluent.Config{
		FluentNetwork: network, FluentHost: host, FluentPort: port,
		TlsInsecureSkipVerify: o.cfg.InsecureSkipVerify,
		Timeout:               o.cfg.ConnectTimeout, WriteTimeout: o.cfg.WriteTimeout, ReadTimeout: o.cfg.AckTimeout,
		RequestAck: true, SubSecondPrecision: true,
		MaxRetry: 1, // attempts, and 0 would be 13
	}
	if network == "unix" {
		c.FluentSocketPath = host
	}
	// In synchronous mode New connects; with an error it returns a client too.
	client, err := fluent.New(c)
	if err != nil {
		return fmt.Errorf("fluentd %s: %w", o.cfg.Address, err)
	}
	o.client, o.used = client, time.Now()
	return nil
}

func (o *simple) disconnect() error {
	if o.client == nil {
		return nil
	}
	err := o.client.Close()
	o.client = nil
	if err != nil {
		return fmt.Errorf("fluentd %s: close: %w", o.cfg.Address, err)
	}
	return nil
}
