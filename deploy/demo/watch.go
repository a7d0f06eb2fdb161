package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"sort"
	"strings"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// counts is what the storefront's sidecar has counted of one destination.
type counts struct {
	requests, failures, retries float64
	buckets                     map[float64]float64 // upper bound in seconds -> cumulative
	state                       float64
	guarded                     bool
}

// scrape reads the metrics of a sidecar.
func scrape(ctx context.Context, address string) (map[string]*counts, error) {
	text, err := fetch(ctx, "http://"+address+"/metrics")
	if err != nil {
		return nil, err
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		return nil, err
	}
	out := map[string]*counts{}
	for name, f := range families {
		for _, m := range f.GetMetric() {
			labels := map[string]string{}
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = l.GetValue()
			}
			service, _, _ := strings.Cut(labels["destination_service"], ".")
			if service == "" || labels["reporter"] == "destination" {
				continue
			}
			c := out[service]
			if c == nil {
				c = &counts{buckets: map[float64]float64{}}
				out[service] = c
			}
			switch name {
			case "outrigger_requests_total":
				c.requests += m.GetCounter().GetValue()
				if code := labels["response_code"]; code == "0" || code >= "500" {
					c.failures += m.GetCounter().GetValue()
				}
			case "outrigger_request_attempts_total":
				if labels["kind"] == "retry" {
					c.retries += m.GetCounter().GetValue()
				}
			case "outrigger_breaker_state":
				c.state, c.guarded = m.GetGauge().GetValue(), true
			case "outrigger_request_duration_seconds":
				for _, b := range m.GetHistogram().GetBucket() {
					c.buckets[b.GetUpperBound()] += float64(b.GetCumulativeCount())
				}
			}
		}
	}
	return out, nil
}

// quantile of the requests between two scrapes, interpolated as PromQL's
// histogram_quantile does.
func quantile(q float64, now, before *counts) time.Duration {
	bounds := make([]float64, 0, len(now.buckets))
	for b := range now.buckets {
		bounds = append(bounds, b)
	}
	sort.Float64s(bounds)
	delta := func(b float64) float64 {
		if before == nil {
			return now.buckets[b]
		}
		return now.buckets[b] - before.buckets[b]
	}
	if len(bounds) == 0 || delta(bounds[len(bounds)-1]) == 0 {
		return 0
	}
	rank := q * delta(bounds[len(bounds)-1])
	lower, below := 0.0, 0.0
	for _, b := range bounds {
		if in := delta(b); in >= rank {
			if math.IsInf(b, 1) {
				return seconds(lower)
			}
			return seconds(lower + (b-lower)*(rank-below)/math.Max(in-below, 1e-9))
		}
		lower, below = b, delta(b)
	}
	return seconds(lower)
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// screen shows the live table: redrawn on a terminal, a line every five seconds
// elsewhere.
type screen struct {
	out      io.Writer
	scene    *scene
	shoppers *shoppers
	story    *story
}

// span of time that the rates of the table are taken over.
const span = 3

func (s *screen) show(ctx context.Context) {
	tty := false
	if f, ok := s.out.(*os.File); ok {
		if i, err := f.Stat(); err == nil {
			tty = i.Mode()&os.ModeCharDevice != 0
		}
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var history []map[string]*counts
	height := 0
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now, err := scrape(ctx, s.scene.places["storefront"].metrics)
		if err != nil {
			continue
		}
		history = append(history, now)
		before := map[string]*counts{}
		if len(history) > span {
			before = history[len(history)-1-span]
		}
		lines := s.lines(now, before, min(len(history), span))
		switch {
		case tty:
			if height > 0 {
				fmt.Fprintf(s.out, "\x1b[%dA\x1b[J", height)
			}
			fmt.Fprintln(s.out, strings.Join(lines, "\n"))
			height = len(lines)
		case n%5 == 4:
			fmt.Fprintln(s.out, strings.Join(lines[2:len(lines)-1], "\n"))
		}
	}
}

func (s *screen) lines(now, before map[string]*counts, over int) []string {
	rate, success, p50, p99 := s.shoppers.lately(span * time.Second)
	out := []string{
		fmt.Sprintf("%-5s %-12s %8s %9s %9s %9s %8s  %s", "time", "destination", "req/s", "success", "p50", "p99", "retries", "breaker"),
		strings.Repeat("-", 80),
		fmt.Sprintf("%4.0fs %-12s %8.1f %8.1f%% %9s %9s %8s  %s", time.Since(s.story.begun).Seconds(), "storefront", rate, 100*success,
			p50.Round(100*time.Microsecond), p99.Round(100*time.Microsecond), "", fmt.Sprintf("%d paid later", s.shoppers.later.Load())),
	}
	for _, service := range []string{"catalog", "cart", "payments"} {
		c := now[service]
		if c == nil {
			continue
		}
		b := before[service]
		if b == nil {
			b = &counts{}
		}
		n := c.requests - b.requests
		good := 1.0
		if n > 0 {
			good = 1 - (c.failures-b.failures)/n
		}
		state := ""
		if c.guarded {
			state = []string{"closed", "HALF-OPEN", "OPEN"}[int(c.state)]
		}
		out = append(out, fmt.Sprintf("%5s %-12s %8.1f %8.1f%% %9s %9s %8.0f  %s", "", "> "+service, n/float64(over), 100*good,
			quantile(.5, c, b).Round(100*time.Microsecond), quantile(.99, c, b).Round(100*time.Microsecond), c.retries, state))
	}
	return append(out, s.story.now())
}

// breakerView is what a sidecar says at /debug/breakers.
type breakerView struct {
	Destination string `json:"destination"`
	State       string `json:"state"`
	Evidence    []struct {
		ID     string    `json:"id"`
		At     time.Time `json:"at"`
		To     string    `json:"to"`
		Reason string    `json:"reason"`
	} `json:"evidence"`
}

func (s *scene) paymentsBreaker(ctx context.Context) (breakerView, error) {
	text, err := fetch(ctx, "http://"+s.places["storefront"].admin+"/debug/breakers")
	if err != nil {
		return breakerView{}, err
	}
	var all []breakerView
	if err := json.Unmarshal([]byte(text), &all); err != nil {
		return breakerView{}, err
	}
	for _, b := range all {
		if strings.HasPrefix(b.Destination, "shop/payments:") {
			return b, nil
		}
	}
	return breakerView{}, fmt.Errorf("the storefront's sidecar has no breaker for payments: the policy has not arrived")
}
