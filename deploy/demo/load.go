package main

import (
	"context"
	"io"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// inFlightMax bounds how many checkouts wait at once; beyond it a shopper is
// turned away, and counted as failed.
const inFlightMax = 500

// shoppers check out at a steady rate (open loop: a slow shop does not slow
// them down).
type shoppers struct {
	done, ok, later, failed atomic.Int64
	firstError              atomic.Pointer[string]

	mu     sync.Mutex
	recent []sample
	group  sync.WaitGroup
}

type sample struct {
	at   time.Time
	took time.Duration
	ok   bool
}

func startLoad(ctx context.Context, url string, rate int) *shoppers {
	s := &shoppers{}
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: inFlightMax}}
	s.group.Go(func() {
		tick := time.NewTicker(time.Second / time.Duration(rate))
		defer tick.Stop()
		tickets := make(chan struct{}, inFlightMax)
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			select {
			case tickets <- struct{}{}:
				s.group.Go(func() { s.checkout(client, url); <-tickets })
			default:
				s.fail("more than 500 checkouts were waiting")
			}
		}
	})
	return s
}

func (s *shoppers) wait() { s.group.Wait() }

// checkout is not cut short when the demo ends: a request that was begun counts.
func (s *shoppers) checkout(client *http.Client, url string) {
	start := time.Now()
	resp, err := client.Get(url)
	if err != nil {
		s.fail(err.Error())
		return
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	_ = resp.Body.Close()
	if err != nil || resp.StatusCode != http.StatusOK {
		s.fail(resp.Status + ": " + string(body))
		return
	}
	s.done.Add(1)
	s.ok.Add(1)
	if resp.Header.Get("X-Paid") == "later" {
		s.later.Add(1)
	}
	s.remember(sample{start, time.Since(start), true})
}

func (s *shoppers) fail(why string) {
	s.done.Add(1)
	s.failed.Add(1)
	s.firstError.CompareAndSwap(nil, &why)
	s.remember(sample{at: time.Now()})
}

func (s *shoppers) remember(v sample) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.recent = append(s.recent, v)
	if len(s.recent) > 4000 {
		s.recent = slices.Clone(s.recent[len(s.recent)-2000:])
	}
}

// lately is the rate, share of successes and latencies of the last d.
func (s *shoppers) lately(d time.Duration) (perSecond, success float64, p50, p99 time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	since := time.Now().Add(-d)
	var took []time.Duration
	n, good := 0, 0
	for _, v := range s.recent {
		if v.at.Before(since) {
			continue
		}
		n++
		if v.ok {
			good++
			took = append(took, v.took)
		}
	}
	if n == 0 {
		return 0, 0, 0, 0
	}
	slices.Sort(took)
	if len(took) > 0 {
		p50, p99 = took[len(took)/2], took[len(took)*99/100]
	}
	return float64(n) / d.Seconds(), float64(good) / float64(n), p50, p99
}
