// Package discard is the output that takes every record and keeps none, for
// measuring the collector itself. Its records count as acknowledged: whoever
// configures it has said that they are not wanted.
package discard

import (
	"context"

	"github.com/outrigger-mesh/outrigger/collector/internal/output"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Config has no fields.
type Config struct{}

// Output discards. It is safe for concurrent use.
type Output struct{}

// Kind returns "discard".
func (Output) Kind() string { return "discard" }

// Traits say that there is one Write at a time.
func (Output) Traits() output.Traits { return output.Traits{Concurrency: 1} }

// Write takes the batch.
func (Output) Write(context.Context, []*record.Record) (r output.Result) { return r }

// Close does nothing.
func (Output) Close() error { return nil }

var _ output.Output = Output{}
