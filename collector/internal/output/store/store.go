// Package store is the output that keeps records in the embedded log store of
// the same process.
//
// It only translates between the store's errors and the pipeline's verdicts; how
// records are kept is package collector/internal/store's matter. The collector's
// main makes it.
package store

import (
	"context"
	"errors"

	"github.com/outrigger-mesh/outrigger/collector/internal/output"
	"github.com/outrigger-mesh/outrigger/collector/internal/store"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Output appends to a store.
type Output struct{ store *store.Store }

// New makes the output. It takes the store over: Close closes it.
func New(s *store.Store) *Output { return &Output{s} }

// Kind returns "store".
func (*Output) Kind() string { return "store" }

// Traits say that there is one Write at a time.
func (*Output) Traits() output.Traits { return output.Traits{Concurrency: 1} }

// Write appends the batch. A full disk is an error of the attempt, not a
// permanent one: the pipeline keeps the records in their files and goes on when
// there is space.
func (o *Output) Write(ctx context.Context, batch []*record.Record) output.Result {
	err := o.store.Append(ctx, batch)
	var refused *store.RefusedError
	if errors.As(err, &refused) {
		var r output.Result
		for _, x := range refused.Records {
			r.Rejected = append(r.Rejected, output.Rejection{Index: x.Index, Reason: x.Reason})
		}
		return r
	}
	return output.Result{Err: err}
}

// Close closes the store.
func (o *Output) Close() error { return o.store.Close() }
