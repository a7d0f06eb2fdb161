package apptest

import (
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// TestControlPlaneLossCostsNothing: requests pass while the control plane is
// killed, away, back, and changes what it says.
func TestControlPlaneLossCostsNothing(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	var sent atomic.Int64
	var mu sync.Mutex
	var failed []string
	stop := make(chan struct{})
	var steady sync.WaitGroup
	for range 4 {
		steady.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(2 * time.Millisecond):
				}
				sent.Add(1)
				if a := call(http.MethodPost, r.url+"/ok"); a.status != http.StatusOK { // a POST: no retry hides a failure
					mu.Lock()
					failed = append(failed, a.String())
					mu.Unlock()
				}
			}
		})
	}
	passes := func(n int64) {
		t.Helper()
		before := sent.Load()
		eventually(t, 10*time.Second, func() string {
			if sent.Load() < before+n {
				return "the steady requests are stuck"
			}
			return ""
		})
	}
	passes(100)
	for round := range 2 {
		r.process.kill()
		passes(200)
		r.controlPlane.start(t)
		eventually(t, 15*time.Second, func() string { return r.settled(t, 1) })
		// What changes while requests pass costs none either.
		endpoints := workload("shipping", r.shipping.addresses[round])
		if problems := r.apply(t, "workload.yaml", endpoints); len(problems) > 0 {
			t.Fatal(problems)
		}
		passes(100)
		if problems := r.apply(t, "policies.yaml", policy(retryPolicy, "shipping", fmt.Sprintf("attempts: %d", round))); len(problems) > 0 {
			t.Fatal(problems)
		}
		passes(100)
	}
	close(stop)
	steady.Wait()
	t.Logf("%d requests", sent.Load())
	if len(failed) > 0 {
		t.Errorf("%d of %d requests failed, the first: %s", len(failed), sent.Load(), failed[0])
	}
}

// TestSidecarDrains: SIGTERM fails no request that has begun, and the sidecar
// ends when the last has its answer.
func TestSidecarDrains(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	const n = 16
	var answers []answer
	done := make(chan struct{})
	go func() {
		defer close(done)
		answers = burst(n, n, func(i int) answer { return call(http.MethodPost, fmt.Sprintf("%s/slow/1s/%d", r.url, i)) })
	}()
	eventually(t, 5*time.Second, func() string {
		r.shipping.mu.Lock()
		defer r.shipping.mu.Unlock()
		if r.shipping.now < n {
			return fmt.Sprintf("%d of %d requests have arrived", r.shipping.now, n)
		}
		return ""
	})
	asked := time.Now()
	if err := r.proxy.process().cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	<-done
	if got := tally(answers); got[http.StatusOK] != n {
		t.Errorf("answers by status (0 is none): %v, want %d with 200", got, n)
	}
	if code := r.proxy.process().exits(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if took := time.Since(asked); took > 4*time.Second {
		t.Errorf("the sidecar took %s to end, and the requests 1s", took)
	}
	if logged := len(accessLog(t, r.proxy.process(), 0, "/slow")); logged != n {
		t.Errorf("%d requests are in the access log, want %d", logged, n)
	}
}
