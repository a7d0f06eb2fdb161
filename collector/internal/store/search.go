package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync/atomic"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/internal/query"
)

// Query is a search.
type Query struct {
	Expr query.Expr // nil matches every record
	// From is included, To is not; zero leaves the side open.
	From, To time.Time
	// Limit is how many lines are returned, the newest. 0 is 1,000; more than
	// MaxResults is MaxResults.
	Limit int
}

// Line is a record that was found: its fields as a JSON object on one line, keys
// in order.
type Line struct {
	Time time.Time
	JSON []byte
	id   int64
}

// LaggedError is given to the reader of a live tail that was too slow. The tail
// goes on after it.
type LaggedError struct{ Skipped int64 }

func (e *LaggedError) Error() string {
	return fmt.Sprintf("%d lines skipped: this reader is slower than the logs it follows; search for them, or narrow the query", e.Skipped)
}

// ErrTooManyFollowers is given where MaxFollowers live tails run already.
var ErrTooManyFollowers = fmt.Errorf("store: %d live tails run already: end one of them", MaxFollowers)

// ErrClosed ends the live tails of a store that is closed.
var ErrClosed = errors.New("store: closed")

// Search returns the records that match, newest first by microsecond, and in the
// order of arrival within one. A record can be found as soon as Append has
// returned. An error is the last thing it yields; one that is a
// context.DeadlineExceeded says that SearchTimeout ended the search early.
func (s *Store) Search(ctx context.Context, q Query) iter.Seq2[Line, error] {
	return func(yield func(Line, error) bool) {
		ctx, cancel := context.WithTimeout(ctx, s.cfg.SearchTimeout)
		defer cancel()
		expr := q.Expr
		if expr == nil {
			expr = query.All{}
		}
		limit := q.Limit
		if limit <= 0 {
			limit = 1000
		}
		limit = min(limit, MaxResults)
		plan := query.Narrow(expr)
		from, to := q.From, q.To
		if plan.From.After(from) {
			from = plan.From
		}
		if !plan.To.IsZero() && (to.IsZero() || plan.To.Before(to)) {
			to = plan.To.Add(1) // a plan's end is included
		}
		_, all := expr.(query.All)
		f := finder{match: query.Compile(expr), all: all, plan: plan, from: from, to: to, left: limit, yield: yield}
		for _, key := range s.keys(from, to) {
			d, err := s.acquire(key, false)
			if err == nil && d == nil { // deleted since
				continue
			}
			if err == nil {
				err = f.day(ctx, d)
				s.release(d)
			}
			if errors.Is(err, errStop) {
				return
			}
			if err != nil {
				if ctx.Err() != nil {
					err = fmt.Errorf("search: stopped in %s after %d records, with %d still to be found: %w; shorten the time range or add a word or service.name", key, f.seen, f.left, context.Cause(ctx))
				}
				yield(Line{}, err)
				return
			}
		}
	}
}

// keys returns the days that overlap [from, to), newest first.
func (s *Store) keys(from, to time.Time) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var keys []string
	for key, d := range s.days {
		if (to.IsZero() || d.start.Before(to)) && d.start.Add(24*time.Hour).After(from) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	slices.Reverse(keys)
	return keys
}

// errStop: the limit is reached or the caller wants no more.
var errStop = errors.New("stop")

// finder is one search on its way through the days.
type finder struct {
	match    func(map[string]any) bool
	all      bool // every record matches
	plan     query.Plan
	from, to time.Time
	left     int // lines still to be found
	seen     int // candidates looked at
	yield    func(Line, error) bool
}

func (f *finder) day(ctx context.Context, d *day) error {
	first, before := int64(0), int64(1)<<62
	if f.from.After(d.start) {
		first = idOf(d.start, f.from)
	}
	if !f.to.IsZero() && f.to.Before(d.start.Add(24*time.Hour)) {
		before = idOf(d.start, f.to) + idSlack
	}
	// Pages grow: the first is quick, and a search that finds little asks seldom.
	for size := 128; ; size = min(size*2, 2048) {
		page, err := d.page(ctx, f.plan.Match, first, before, size)
		if err != nil {
			return err
		}
		for _, c := range page {
			f.seen++
			t := time.Unix(0, c.time).UTC()
			if t.Before(f.from) || !f.to.IsZero() && !t.Before(f.to) {
				continue
			}
			if !f.all {
				var fields map[string]any
				if err := json.Unmarshal(c.line, &fields); err != nil {
					return fmt.Errorf("%s: record %d: %w", d.path, c.id, err)
				}
				if !f.match(fields) {
					continue
				}
			}
			if !f.yield(Line{Time: t, JSON: c.line, id: c.id}, nil) {
				return errStop
			}
			if f.left--; f.left == 0 {
				return errStop
			}
		}
		if len(page) < size {
			return nil
		}
		before = page[len(page)-1].id
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

// follower is one live tail.
type follower struct {
	match   func(map[string]any) bool
	lines   chan Line
	skipped atomic.Int64
	closed  chan struct{} // by Store.Close
}

// Follow returns the records that match and are appended from now on, in the
// order of arrival, until ctx ends. "Now" is the call of Follow, not the first
// step of the loop; the caller must range over the result, which ends the
// subscription. A *LaggedError reports lines that were skipped, and the tail goes
// on; any other error is the last.
func (s *Store) Follow(ctx context.Context, expr query.Expr) iter.Seq2[Line, error] {
	f, err := s.subscribe(expr)
	return func(yield func(Line, error) bool) {
		if err != nil {
			yield(Line{}, err)
			return
		}
		defer s.unsubscribe(f)
		for {
			select {
			case line := <-f.lines:
				if n := f.skipped.Swap(0); n > 0 && !yield(Line{}, &LaggedError{n}) {
					return
				}
				if !yield(line, nil) {
					return
				}
			case <-ctx.Done():
				return
			case <-f.closed:
				yield(Line{}, ErrClosed)
				return
			}
		}
	}
}

func (s *Store) subscribe(expr query.Expr) (*follower, error) {
	f := &follower{match: query.Compile(expr), lines: make(chan Line, followerQueue), closed: make(chan struct{})}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return nil, ErrClosed
	case len(s.followers) >= MaxFollowers:
		return nil, ErrTooManyFollowers
	}
	s.followers[f] = struct{}{}
	return f, nil
}

func (s *Store) unsubscribe(f *follower) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.followers, f)
}

// publish shows stored rows to the live tails and never waits for one.
func (s *Store) publish(rows []row) {
	s.mu.Lock()
	followers := make([]*follower, 0, len(s.followers))
	for f := range s.followers {
		followers = append(followers, f)
	}
	s.mu.Unlock()
	for _, f := range followers {
		for _, r := range rows {
			if !f.match(r.fields) {
				continue
			}
			select {
			case f.lines <- Line{Time: r.time, JSON: r.line, id: r.id}:
			default:
				f.skipped.Add(1)
				s.skipped.Add(1)
			}
		}
	}
}
