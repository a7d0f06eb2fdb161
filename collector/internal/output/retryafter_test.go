package output_test

import (
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/internal/output"
)

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 11, 23, 3, 0, 0, 0, time.UTC)
	f := func(in string, want time.Duration) {
		t.Helper()
		if got := output.RetryAfter(in, now); got != want {
			t.Errorf("%q: %s; want %s", in, got, want)
		}
	}
	f("", 0)
	f("5", 5*time.Second)
	f("-5", 0)
	f("99999999999", 24*time.Hour)
	f("99999999999999999999", 0)
	f("Mon, 23 Nov 2026 03:00:30 GMT", 30*time.Second)
	f("Mon, 23 Nov 2026 02:00:30 GMT", 0)
	f("Fri, 27 Nov 2026 03:00:00 GMT", 24*time.Hour)
	f("soon", 0)
}
