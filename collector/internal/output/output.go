// Package output is the contract between the pipeline and the backends: what an
// output does with a batch, and what it says of every record in it.
//
// It knows no backend and does no I/O. The pipeline owns retries, backoff, the
// circuit breaker and the accounting; an output makes one attempt and tells the
// truth about it.
package output

import (
	"context"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Output ships records to one backend. The pipeline calls Write from at most
// Traits().Concurrency goroutines at a time. Close releases what the output
// holds; after it, Write is not called.
type Output interface {
	// Kind is the name in the configuration: store, elasticsearch, fluentd.
	Kind() string
	// Traits are constant and asked for once.
	Traits() Traits
	// Write makes one attempt to ship the batch. It returns when the backend has
	// answered or ctx has ended. The batch is not changed and not kept.
	Write(ctx context.Context, batch []*record.Record) Result
	Close() error
}

// Traits say how an output wants to be called.
type Traits struct {
	// Concurrency is how many Writes it takes at a time; 0 means 1. With 1 the
	// records of a stream arrive in order. The pipeline uses fewer while the backend
	// is slow or asks to be spared.
	Concurrency int
	// MaxRecords and MaxBytes (of the lines) bound a batch further than the
	// configuration does; 0 does not.
	MaxRecords, MaxBytes int
}

// Result is the backend's verdict on a batch. The records that it does not name
// were stored durably by the backend: acknowledged.
type Result struct {
	// Err is set where the attempt as a whole failed (refused connection, 503,
	// 413): nothing was acknowledged and Retry and Rejected are empty.
	Err error
	// Permanent: the attempt would fail again whatever the batch (wrong
	// credentials, no such index and no right to make one). The pipeline keeps
	// the records and tries again slowly, saying so.
	Permanent bool
	// TooLarge: the backend refused the size; the pipeline halves the batch.
	TooLarge bool
	// RetryAfter that the backend asked for; 0 if it did not.
	RetryAfter time.Duration
	// Retry holds the indices of records to send again (429 and 503 per item).
	Retry []int
	// Rejected records will never be stored; they go to the dead letters.
	Rejected []Rejection
}

// Rejection is a record that the backend refused for good, in its own words.
type Rejection struct {
	Index  int
	Reason string
}
