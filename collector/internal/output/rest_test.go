package output_test

import (
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/internal/output"
)

func TestRest(t *testing.T) {
	now := time.Date(2026, 11, 23, 3, 0, 0, 0, time.UTC)
	var r output.Rest
	if r.Resting(now) {
		t.Error("it rests before it has failed")
	}
	fail := func(want time.Duration) {
		t.Helper()
		r.Failed(now)
		if !r.Resting(now.Add(want-1)) || r.Resting(now.Add(want)) {
			t.Errorf("it does not rest for %s", want)
		}
		now = now.Add(want)
	}
	for _, seconds := range []int{1, 2, 4, 8, 16, 32, 60, 60} {
		fail(time.Duration(seconds) * time.Second)
	}
	for range 100 { // nothing runs over
		fail(time.Minute)
	}
	r.Worked()
	fail(time.Second)
	r.Failed(now)
	r.Worked()
	if !r.Resting(now) {
		t.Error("a rest under way ended")
	}
	fail(time.Second)
}
