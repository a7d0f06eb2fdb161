package main

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
)

// What a program printed cannot colour, move or rename the terminal of the one
// who reads it, and columns stay columns.
func TestTextIsCleanAndAligned(t *testing.T) {
	records := func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, `{"@timestamp":"2026-11-23T03:00:02Z","service.name":"recommendations-v2","log.level":"warn","message":"\u001b[1;31mred\u001b[0m and \u001b]0;title\u0007 bell\tdone\r\n"}`)
		fmt.Fprintln(w, `{"@timestamp":"2026-11-23T03:00:01.000000000Z","service.name":"cart","log.level":"error","message":"panic: boom\n\ngoroutine 1:\n\tmain.go:7","trace.id":"ab"}`)
	}
	const want = `2026-11-23T03:00:01.000 cart               error panic: boom

                                                 goroutine 1:
                                                     main.go:7 trace.id=ab
2026-11-23T03:00:02Z    recommendations-v2 warn  red and \x1b]0;title\a bell    done
`
	out, _, err := asked(t, records, "", "logs", "search")
	if err != nil || out != want {
		t.Errorf("%v, got\n%s\nwant\n%s", err, out, want)
	}
	out, _, err = asked(t, records, "", "logs", "tail")
	if err != nil || !strings.HasPrefix(out, "2026-11-23T03:00:02Z    recommendations-v2 warn  red and") || !strings.Contains(out, "01.000 cart               error panic") {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestClean(t *testing.T) {
	f := func(in, want string) {
		t.Helper()
		if got := clean(in); got != want {
			t.Errorf("clean(%q) = %q, want %q", in, got, want)
		}
	}
	f("plain – größe ✓", "plain – größe ✓")
	f("\x1b[38;5;196mred\x1b[m", "red")
	f("\x1b[2J\x1b[Hgone", "gone")
	f("\x1b[3", `\x1b[3`)
	f("\x1b[3ü", `\x1b[3ü`)
	f("a\x1b", `a\x1b`)
	f("a\u009b31mb", `a\u009b31mb`)
	f("nul\x00", `nul\x00`)
	f("\xff\x07", "\xff\\a")
}

func FuzzClean(f *testing.F) {
	f.Add("\x1b[31mred\x1b[0m\t\u009b")
	f.Fuzz(func(t *testing.T, s string) {
		if out := clean(s); strings.ContainsFunc(out, func(r rune) bool { return r < 0x20 || r >= 0x7f && r < 0xa0 }) {
			t.Errorf("clean(%q) = %q has control characters", s, out)
		}
	})
}

// Who reads a search that stopped at its limit is told so.
func TestSearchTellsOfItsLimit(t *testing.T) {
	_, diag, err := asked(t, func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, `{"message":"a"}`)
		fmt.Fprintln(w, `{"message":"b"}`)
	}, "", "logs", "search", "--limit", "2")
	if err != nil || !strings.Contains(diag, "newest 2") || !strings.Contains(diag, "--limit") {
		t.Errorf("%v, %q", err, diag)
	}
}
