// Package fluentd is the output to fluentd, Fluent Bit and whatever else takes the
// forward protocol, version 1.
//
// It knows tags, events, chunks, acknowledgements and the handshake by a shared
// key; the pipeline, which calls it, owns retries and the circuit breaker.
//
// The default mode, forward, packs the events of a tag into chunks
// (PackedForward, or CompressedPackedForward), and has several chunks on their way
// at a time. It is this package's own, because no client library for Go has
// chunks, the handshake or compression. The mode simple sends one event a message
// by fluent-logger-golang; a round trip an event bounds its rate.
//
// An acknowledgement means that the server's own buffer has taken the events, no
// more. Events are sent again when their acknowledgement was lost, so the server
// can see them twice. A server with skip_invalid_event acknowledges what it skips.
//
// A server drops a chunk over its chunk_size_limit and says nothing. So a chunk
// whose acknowledgement does not come makes the next chunks smaller by half, down to
// 64 KiB, until the collector is started again. A chunk of one record above that,
// which the server does not acknowledge although it acknowledges what was sent after
// it, is rejected: it goes to the dead letters and not round for ever.
package fluentd

import (
	"context"
	"log/slog"
	"strings"

	"github.com/outrigger-mesh/outrigger/collector/internal/output"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Output sends records to forward servers. It takes one Write at a time, which
// keeps the records of a tag in order.
type Output struct {
	mode sender
}

type sender interface {
	Write(ctx context.Context, batch []*record.Record) output.Result
	Close() error
}

// New makes the output. It does not connect and reads no files; a server that is
// away is the first Write's matter.
func New(cfg Config, log *slog.Logger) (*Output, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	t, err := parseTag(cfg.Tag)
	if err != nil {
		return nil, err
	}
	if cfg.Mode == modeSimple {
		return &Output{mode: &simple{cfg: cfg, log: log, tag: t}}, nil
	}
	return &Output{mode: newForward(cfg, log, t)}, nil
}

// Kind returns "fluentd".
func (*Output) Kind() string { return "fluentd" }

// Traits are one Write at a time; the window of chunks gives the throughput.
func (*Output) Traits() output.Traits { return output.Traits{Concurrency: 1} }

// Write sends the batch. Events whose chunk was acknowledged are acknowledged, even
// if another chunk of the batch failed.
func (o *Output) Write(ctx context.Context, batch []*record.Record) output.Result {
	return o.mode.Write(ctx, batch)
}

// Close closes the connections.
func (o *Output) Close() error { return o.mode.Close() }

// maxReason bounds what is passed on of another's words, in bytes.
const maxReason = 512

func shorten(s string) string {
	if len(s) > maxReason {
		s = s[:maxReason] + "…"
	}
	return strings.ToValidUTF8(s, "�")
}

var _ output.Output = (*Output)(nil)
