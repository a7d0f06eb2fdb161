package http2_test

import (
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/http2"
)

func TestARationComesBackWithTimeAndWork(t *testing.T) {
	var m http2.TestMeter
	now := time.Unix(1000, 0)
	taken := func() (n int) {
		for m.Take(now, 10, 2) {
			n++
		}
		return n
	}
	if n := taken(); n != 10 {
		t.Errorf("the burst was %d, want 10", n)
	}
	now = now.Add(3 * time.Second)
	if n := taken(); n != 6 {
		t.Errorf("3 seconds brought %d, want 6", n)
	}
	now = now.Add(time.Hour)
	if n := taken(); n != 10 {
		t.Errorf("an hour brought %d, want the burst of 10", n)
	}
	m.Earn(4, 10)
	if n := taken(); n != 4 {
		t.Errorf("work for 4 brought %d", n)
	}
	now = now.Add(-time.Minute)
	if n := taken(); n != 0 {
		t.Errorf("a clock that went back brought %d", n)
	}
}
