package main

import (
	"os"
	"strings"
	"testing"
)

func TestOnlyUnwrittenPagesOfTheProgramAreGivenBack(t *testing.T) {
	f := func(line string, want bool) {
		t.Helper()
		if _, _, got := unwritten(line, "/sidecar"); got != want {
			t.Errorf("%s: %v; want %v", line, got, want)
		}
	}
	f("00400000-00c00000 r-xp 00000000 08:01 12 /sidecar\n", true)
	f("00c00000-01800000 r--p 00800000 08:01 12 /sidecar\n", true)
	f("01800000-01900000 rw-p 01400000 08:01 12 /sidecar\n", false)
	f("00400000-00c00000 r-xp 00000000 08:01 12 /other\n", false)
	f("c000000000-c000400000 rw-p 00000000 00:00 0 \n", false)
	f("555500000000-555500c00000 r--p 00000000 08:01 12 /sidecar\n", false)
	f("7ffd1000-7ffd3000 r-xp 00000000 00:00 0 [vdso]\n", false)
}

// resident memory in KiB of this process, from /proc.
func resident(t *testing.T) (kib int) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Skip("no /proc here: ", err)
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			for _, c := range rest {
				if c >= '0' && c <= '9' {
					kib = 10*kib + int(c-'0')
				}
			}
		}
	}
	return kib
}

func TestGiveBackLowersResidentMemory(t *testing.T) {
	before := resident(t)
	giveBack()
	if after := resident(t); after >= before {
		t.Errorf("%d KiB before, %d after", before, after)
	}
}
