package influxdb

import (
	"context"
	"slices"
	"strings"
	"sync"
)

// batch is line protocol of so many points; every line ends in a newline.
type batch struct {
	text   string
	points int
	splits int // how often it has been halved
}

// halve needs at least two points.
func (b *batch) halve() (first, second *batch) {
	n, at := b.points/2, 0
	for range n {
		at += strings.IndexByte(b.text[at:], '\n') + 1
	}
	return &batch{b.text[:at], n, b.splits + 1}, &batch{b.text[at:], b.points - n, b.splits + 1}
}

// queue holds batches in the order of their gathering, at most limit points
// beside a single batch. The batch that is being sent stays in it and is not
// dropped: the server may have taken it already.
type queue struct {
	limit int

	mu      sync.Mutex
	batches []*batch
	points  int
	sending *batch
	closed  bool
	wake    chan struct{} // holds one token when there is something to see
}

func newQueue(limit int) *queue { return &queue{limit: limit, wake: make(chan struct{}, 1)} }

// push adds b and returns how many points were dropped to make room: the oldest.
func (q *queue) push(b *batch) (lost int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.points+b.points > q.limit {
		i := slices.IndexFunc(q.batches, func(x *batch) bool { return x != q.sending })
		if i < 0 {
			break
		}
		lost += q.batches[i].points
		q.points -= q.batches[i].points
		q.batches = slices.Delete(q.batches, i, i+1)
	}
	q.batches = append(q.batches, b)
	q.points += b.points
	q.signal()
	return lost
}

// take returns the oldest batch, waiting for one; nil once the queue is closed
// and empty, or ctx has ended.
func (q *queue) take(ctx context.Context) *batch {
	for {
		q.mu.Lock()
		if len(q.batches) > 0 {
			q.sending = q.batches[0]
			q.mu.Unlock()
			return q.sending
		}
		closed := q.closed
		q.mu.Unlock()
		if closed {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-q.wake:
		}
	}
}

// giveBack ends the sending of the batch that take returned: it is replaced by
// the batches given, in its place; itself, to try again.
func (q *queue) giveBack(with ...*batch) {
	q.mu.Lock()
	defer q.mu.Unlock()
	i := slices.Index(q.batches, q.sending)
	q.points -= q.sending.points
	for _, b := range with {
		q.points += b.points
	}
	q.batches = slices.Replace(q.batches, i, i+1, with...)
	q.sending = nil
}

func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.signal()
}

// drain empties the queue and returns how many points were in it.
func (q *queue) drain() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := q.points
	q.batches, q.points = nil, 0
	return n
}

func (q *queue) size() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.points
}

func (q *queue) signal() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}
