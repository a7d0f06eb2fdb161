package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"strings"
	"sync"
	"time"
)

// story is what must happen, step by step, and whether it did.
type story struct {
	scene    *scene
	shoppers *shoppers
	begun    time.Time

	mu      sync.Mutex
	current string
	steps   []step

	evidenceID string
}

type step struct {
	what, figure string
	ok           bool
}

func (t *story) note(ok bool, what, figure string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.steps = append(t.steps, step{what, fmt.Sprintf(figure, args...), ok})
}

func (t *story) say(text string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.current = text
}

func (t *story) now() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return "      " + t.current
}

// until waits for the time at of the story; false when the demo ends first.
func (t *story) until(ctx context.Context, at time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(time.Until(t.begun.Add(at))):
		return true
	}
}

// tell plays the story once.
func (t *story) tell(ctx context.Context) {
	t.say("all is well")
	for _, act := range []struct {
		at   time.Duration
		play func(context.Context)
	}{
		{failAt, t.breaks}, {healAt, t.heals}, {killAt, t.losesControlPlane}, {restartAt, t.regainsControlPlane},
	} {
		if !t.until(ctx, act.at) {
			return
		}
		act.play(ctx)
	}
}

func (t *story) breaks(ctx context.Context) {
	_, success, _, _ := t.shoppers.lately(failAt - 3*time.Second)
	t.note(success >= 0.99, "the shop runs through its sidecars", "%.1f %% of checkouts succeeded", 100*success)
	at := time.Now()
	if err := t.scene.setFailing(ctx, true); err != nil {
		t.note(false, "payments begins to fail", "%v", err)
		return
	}
	t.say("payments fails every call")
	b, ok := t.awaitBreaker(ctx, "open", at, 10*time.Second)
	if !ok {
		t.note(false, "the breaker opens", "it is %s 10 s after payments began to fail", b.State)
		return
	}
	e := b.Evidence[0]
	for _, v := range b.Evidence {
		if v.To == "open" {
			e = v // the newest come first: the last one is the first opening
		}
	}
	t.mu.Lock()
	t.evidenceID = e.ID
	t.mu.Unlock()
	t.note(true, "the breaker opens", "after %.1f s: %s", e.At.Sub(at).Seconds(), e.Reason)
	t.say(fmt.Sprintf("the breaker opened: %s\n      why?  %s --collector %s why %s", e.Reason, t.scene.binary("outrigger"), t.scene.collectorAdmin, e.ID))
	t.explains(ctx, e.ID)
	t.finds(ctx)
	later, failed := t.shoppers.later.Load(), t.shoppers.failed.Load()
	if !t.until(ctx, healAt-time.Second) {
		return
	}
	later, failed = t.shoppers.later.Load()-later, t.shoppers.failed.Load()-failed
	t.note(later > 0 && failed == 0, "the storefront keeps serving with its fallback", "%d orders taken to be paid later, %d failed", later, failed)
}

// explains asks the command that a person would type at 3 a.m.
func (t *story) explains(ctx context.Context, id string) {
	var out string
	var err error
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if out, err = t.ask(ctx, "why", id); err == nil {
			break
		}
	}
	shown := strings.Count(out, "POST /pay")
	t.note(err == nil && shown > 0 && strings.Contains(out, "because"), "outrigger why "+id, "shows the arithmetic and %d requests%s", shown, because(err))
}

// finds measures how long a line that payments logs takes until search has it.
// The order that is declined goes past the storefront, whose breaker would
// reject it.
func (t *story) finds(ctx context.Context) {
	order := fmt.Sprintf("order-%d", time.Now().UnixNano())
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+t.scene.places["payments"].inbound+"/pay", strings.NewReader(`{"id":"`+order+`"}`))
	if err != nil {
		t.note(false, "a line that payments logs is found by search", "%v", err)
		return
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.note(false, "a line that payments logs is found by search", "%v", err)
		return
	}
	_ = resp.Body.Close() // it was declined, as it should be
	logged := time.Now()
	for {
		out, err := t.ask(ctx, "logs", "search", `service.name:payments AND "declined" AND order.id:`+order, "--since", "1m")
		took := time.Since(logged)
		if err == nil && strings.Contains(out, "payment declined") {
			t.note(took < 2*time.Second, "a line that payments logs is found by search", "after %.2f s", took.Seconds())
			return
		}
		if took > 10*time.Second || ctx.Err() != nil {
			t.note(false, "a line that payments logs is found by search", "not within %.0f s%s", took.Seconds(), because(err))
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (t *story) heals(ctx context.Context) {
	at := time.Now()
	if err := t.scene.setFailing(ctx, false); err != nil {
		t.note(false, "payments heals", "%v", err)
		return
	}
	t.say("payments is well again")
	b, ok := t.awaitBreaker(ctx, "closed", at, 11*time.Second)
	if !ok {
		t.note(false, "the breaker closes", "it is %s 11 s after payments healed", b.State)
		return
	}
	t.note(true, "the breaker closes", "%.1f s after payments healed: %s", b.Evidence[0].At.Sub(at).Seconds(), b.Evidence[0].Reason)
	t.say("the breaker closed: " + b.Evidence[0].Reason)
}

func (t *story) losesControlPlane(context.Context) {
	t.scene.plane.kill()
	t.say("the control plane was killed: the sidecars go on with what they know")
}

func (t *story) regainsControlPlane(ctx context.Context) {
	during := t.shoppers.recentSince(t.begun.Add(killAt))
	t.note(during.failed == 0 && during.n > 0, "the control plane dies", "%d checkouts meanwhile, %d failed", during.n, during.failed)
	if err := t.scene.startPlane(); err != nil {
		t.note(false, "the control plane comes back", "%v", err)
		return
	}
	started := time.Now()
	for time.Since(started) < 10*time.Second {
		text, err := fetch(ctx, "http://"+t.scene.planeAdmin+"/debug/proxies")
		if err == nil && strings.Count(text, "storefront-0.shop") > 0 {
			t.note(true, "the control plane comes back", "the storefront's sidecar is connected again after %.1f s", time.Since(started).Seconds())
			t.say("the control plane is back")
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.note(false, "the control plane comes back", "the storefront's sidecar has not connected within 10 s")
}

// awaitBreaker waits until the breaker of payments has changed to a state since
// the time given.
func (t *story) awaitBreaker(ctx context.Context, state string, since time.Time, patience time.Duration) (b breakerView, ok bool) {
	for end := time.Now().Add(patience); time.Now().Before(end) && ctx.Err() == nil; time.Sleep(50 * time.Millisecond) {
		v, err := t.scene.paymentsBreaker(ctx)
		if err != nil {
			continue
		}
		b = v
		if len(b.Evidence) > 0 && b.State == state && b.Evidence[0].At.After(since) {
			return b, true
		}
	}
	return b, false
}

// ask runs the command-line program as a user would.
func (t *story) ask(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, t.scene.binary("outrigger"), append([]string{"--collector", t.scene.collectorAdmin}, args...)...)
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = errors.New(strings.TrimSpace(string(exit.Stderr)))
	}
	return string(out), err
}

func because(err error) string {
	if err == nil {
		return ""
	}
	return ": " + err.Error()
}

// summary prints what happened; its error says which steps did not.
func (t *story) summary(w io.Writer) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	fmt.Fprintf(w, "\nSummary\n\n")
	missing := 0
	expected := 9
	for _, s := range t.steps {
		mark := "ok    "
		if !s.ok {
			mark = "FAILED"
			missing++
		}
		fmt.Fprintf(w, "  %s  %-46s %s\n", mark, s.what, s.figure)
	}
	failed := t.shoppers.failed.Load()
	mark := "ok    "
	if failed > 0 {
		mark = "FAILED"
		missing++
	}
	figure := fmt.Sprintf("%d, %d failed, %d with the fallback", t.shoppers.done.Load(), failed, t.shoppers.later.Load())
	if p := t.shoppers.firstError.Load(); p != nil {
		figure += "; first error: " + *p
	}
	fmt.Fprintf(w, "  %s  %-46s %s\n", mark, "checkouts", figure)
	fmt.Fprintf(w, "\n  evidence   %s\n", t.evidenceID)
	fmt.Fprintf(w, "  memory     sidecar of storefront %.1f MB, collector %.1f MB, control plane %.1f MB (resident, under this load)\n\n",
		float64(t.scene.find("storefront-0/outrigger-proxy").rssKB())/1024, float64(t.scene.collector.rssKB())/1024, float64(t.scene.plane.rssKB())/1024)
	if n := len(t.steps) + 1; n < expected {
		return fmt.Errorf("only %d of the story's %d steps took place", n, expected)
	}
	if missing > 0 {
		return fmt.Errorf("%d of the story's steps did not happen as told above", missing)
	}
	fmt.Fprintln(w, "The whole story happened.")
	return nil
}

func (s *scene) find(name string) *process {
	for _, p := range s.running {
		if p.name == name {
			return p
		}
	}
	return nil
}

// tallied is how checkouts went since a time.
type tallied struct{ n, failed int }

func (s *shoppers) recentSince(at time.Time) tallied {
	s.mu.Lock()
	defer s.mu.Unlock()
	var t tallied
	for _, v := range s.recent {
		if v.at.Before(at) {
			continue
		}
		t.n++
		if !v.ok {
			t.failed++
		}
	}
	return t
}
