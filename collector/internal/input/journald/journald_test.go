package journald

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"github.com/outrigger-mesh/outrigger/collector/internal/input/journal"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// standIn is a script in place of journalctl: its n-th start writes the text of
// outs[n] and ends, or stays if that does not begin with "!"; after the last it
// stays and writes nothing.
type standIn struct {
	t   *testing.T
	dir string
}

func newStandIn(t *testing.T, outs ...string) *standIn {
	t.Helper()
	s := &standIn{t, t.TempDir()}
	s.write("journalctl", `#!/bin/sh
dir=${0%/*}
n=$(cat "$dir/n" 2>/dev/null || echo 0)
echo $((n+1)) > "$dir/n"
echo "$@" >> "$dir/args"
if [ -f "$dir/err.$n" ]; then cat "$dir/err.$n" >&2; exit 1; fi
if [ -f "$dir/end.$n" ]; then cat "$dir/end.$n"; exit 3; fi
if [ -f "$dir/out.$n" ]; then cat "$dir/out.$n"; fi
exec sleep 600
`)
	for i, text := range outs {
		name := "out"
		if rest, ok := strings.CutPrefix(text, "!"); ok {
			name, text = "end", rest
		} else if rest, ok := strings.CutPrefix(text, "stderr:"); ok {
			name, text = "err", rest
		}
		s.write(fmt.Sprintf("%s.%d", name, i), text)
	}
	return s
}

func (s *standIn) write(name, text string) {
	s.t.Helper()
	if err := os.WriteFile(filepath.Join(s.dir, name), []byte(text), 0o700); err != nil {
		s.t.Fatal(err)
	}
}

func (s *standIn) starts() []string {
	b, err := os.ReadFile(filepath.Join(s.dir, "args"))
	if err != nil {
		return nil
	}
	return strings.Split(strings.TrimSpace(string(b)), "\n")
}

type input struct {
	*Input
	t       *testing.T
	folder  string
	pending atomic.Int64
	stop    func()
}

func start(t *testing.T, cfg Config) *input {
	t.Helper()
	in := &input{t: t, folder: t.TempDir()}
	log := slog.New(slog.DiscardHandler)
	w, err := journal.Open(journal.Config{Folder: in.folder, Pending: in.pending.Load, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	cfg.Journal, cfg.Log = w, log
	if in.Input, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	in.backoff = 10 * time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- in.Run(ctx) }()
	in.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(in.stop)
	return in
}

func (in *input) bodies() (out []string) {
	for _, r := range in.records() {
		out = append(out, r.Body)
	}
	return out
}

func (in *input) records() (out []*record.Record) {
	in.t.Helper()
	b, err := os.ReadFile(filepath.Join(in.folder, "0.log"))
	if err != nil {
		in.t.Fatal(err)
	}
	var d journal.Decoder
	for text := range bytes.Lines(b) {
		rec := new(record.Record)
		if d.Decode(text, rec) == nil { // the last line may be half written
			out = append(out, rec)
		}
	}
	return out
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

func line(cursor, message string) string {
	return fmt.Sprintf(`{"__CURSOR":%q,"MESSAGE":%q,"__REALTIME_TIMESTAMP":"1795651561400068"}`+"\n", cursor, message)
}

// A child that ends is started again after the last entry that is on the disk, and
// so is the collector; half a line comes again.
func TestGoesOn(t *testing.T) {
	cursor := filepath.Join(t.TempDir(), "cursor")
	fake := newStandIn(t, "!"+line("s=1", "one")+line("s=2", "two")+`{"__CURSOR":"s=3","MESS`, line("s=3", "three"), line("s=4", "four"))
	cfg := Config{Binary: filepath.Join(fake.dir, "journalctl"), CursorFile: cursor, Units: []string{"kubelet.service"}, Directory: "/d", Namespace: "n"}
	in := start(t, cfg)
	eventually(t, "three", func() bool { b, _ := os.ReadFile(cursor); return string(b) == "s=3\n" })
	in.stop()
	if d := cmp.Diff([]string{"one", "two", "three"}, in.bodies()); d != "" {
		t.Error(d)
	}
	second := start(t, cfg)
	eventually(t, "four", func() bool { return len(second.bodies()) == 1 })
	second.stop()
	starts := fake.starts()
	if len(starts) != 3 || !strings.Contains(starts[0], "--since=@") || !strings.Contains(starts[1], "--after-cursor=s=2") || !strings.HasSuffix(starts[2], "--after-cursor=s=3") {
		t.Errorf("%q", starts)
	}
	if want := "--output=json --all --follow --no-tail --quiet --directory=/d --namespace=n --unit=kubelet.service"; !strings.HasPrefix(starts[0], want) {
		t.Errorf("%q", starts[0])
	}
	if n := testutil.ToFloat64(in.starts); n != 2 {
		t.Errorf("%v starts", n)
	}
}

// A cursor that is damaged, or that journalctl does not take, is set aside.
func TestBadCursor(t *testing.T) {
	for name, c := range map[string]struct {
		text string
		outs []string
	}{
		"damaged":     {"s=1;i=", []string{line("s=9", "all again")}},
		"empty":       {"", []string{line("s=9", "all again")}},
		"not a text":  {"\x00\x01\n", []string{line("s=9", "all again")}},
		"not allowed": {"s=1\n", []string{"stderr:Failed to seek to cursor: Invalid argument", line("s=9", "all again")}},
	} {
		t.Run(name, func(t *testing.T) {
			cursor := filepath.Join(t.TempDir(), "cursor")
			if err := os.WriteFile(cursor, []byte(c.text), 0o600); err != nil {
				t.Fatal(err)
			}
			fake := newStandIn(t, c.outs...)
			in := start(t, Config{Binary: filepath.Join(fake.dir, "journalctl"), CursorFile: cursor})
			eventually(t, "goes on", func() bool { b, _ := os.ReadFile(cursor); return string(b) == "s=9\n" })
			if d := cmp.Diff([]string{"all again"}, in.bodies()); d != "" {
				t.Error(d)
			}
			if _, err := os.Stat(cursor + damaged); err != nil {
				t.Error(err)
			}
		})
	}
}

// While the outputs are behind, nothing is taken and the cursor stays.
func TestFull(t *testing.T) {
	cursor := filepath.Join(t.TempDir(), "cursor")
	var text strings.Builder
	for i := range 1000 {
		text.WriteString(line(fmt.Sprint("s=", i), fmt.Sprint("line ", i)))
	}
	fake := newStandIn(t, "", text.String())
	in := start(t, Config{Binary: filepath.Join(fake.dir, "journalctl"), CursorFile: cursor})
	in.pending.Store(1 << 40)
	eventually(t, "the first child", func() bool { return len(fake.starts()) == 1 })
	in.stop()
	in = start(t, Config{Binary: filepath.Join(fake.dir, "journalctl"), CursorFile: cursor})
	in.pending.Store(1 << 40)
	eventually(t, "the second child", func() bool { return len(fake.starts()) == 2 })
	if _, err := os.Stat(cursor); err == nil && len(in.bodies()) == 0 {
		t.Error("a cursor without its entries")
	}
	in.pending.Store(0)
	eventually(t, "all", func() bool { b, _ := os.ReadFile(cursor); return string(b) == "s=999\n" })
	got := in.bodies()
	if len(got) != 1000 {
		t.Fatalf("%d entries", len(got))
	}
	for i, b := range got {
		if b != fmt.Sprint("line ", i) {
			t.Fatalf("at %d: %q", i, b)
		}
	}
}

func TestConfig(t *testing.T) {
	w, err := journal.Open(journal.Config{Folder: t.TempDir(), Pending: func() int64 { return 0 }})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = w.Close() }()
	for want, cfg := range map[string]Config{
		"read by systemd's own program": {Journal: w, CursorFile: "c", Binary: "/not/there"},
		"no file for the cursor":        {Journal: w},
		"is not a unit":                 {Journal: w, CursorFile: "c", Units: []string{""}},
		"how far back":                  {Journal: w, CursorFile: "c", Since: -1},
	} {
		if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

func TestRecord(t *testing.T) {
	now := time.Unix(5, 0).UTC()
	s := resources{cluster: "c"}
	text := `{"_SYSTEMD_UNIT":"kubelet.service","_PID":"42","_COMM":"kubelet","PRIORITY":"3","SYSLOG_IDENTIFIER":"kubelet","__REALTIME_TIMESTAMP":"1795651561400068","_SOURCE_REALTIME_TIMESTAMP":"1795651561399943",
		"MESSAGE":"failed","_HOSTNAME":"h","__CURSOR":"s=1;i=2","_CAP_EFFECTIVE":"1ff","POD":["a","b"],"BLOB":[255,65],"EMPTY":null,"CODE_LINE":"x"}`
	got, cursor, err := s.record([]byte(text), now)
	want := &record.Record{
		Time: time.UnixMicro(1795651561399943).UTC(), Observed: now, Body: "failed", Level: "error", Resource: &record.Resource{Cluster: "c", Node: "h", Service: "kubelet"},
		Attributes: map[string]any{
			"event.dataset": "journald", "systemd.unit": "kubelet.service", "process.pid": 42.0, "process.name": "kubelet", "log.syslog.severity.code": 3.0, "log.syslog.appname": "kubelet",
			"journald.custom.pod": "a\nb", "journald.custom.blob": "\uFFFDA", "journald.custom.code_line": "x",
		},
	}
	if d := cmp.Diff(want, got); d != "" || cursor != "s=1;i=2" || err != nil {
		t.Errorf("%s%q %v", d, cursor, err)
	}
	again, _, _ := s.record([]byte(text), now)
	if again.Resource != got.Resource {
		t.Error("the resource of a unit is two")
	}
	for message, want := range map[string]string{`[104,105]`: "hi", `null`: "", `["a","b"]`: "a\nb", `[[104],[105]]`: "h\ni", `[256]`: "", `7`: "", `{}`: ""} {
		r, _, err := s.record([]byte(`{"MESSAGE":`+message+`}`), now)
		if err != nil || r.Body != want || !r.Time.Equal(now) {
			t.Errorf("%s: %q %v", message, r.Body, err)
		}
	}
	for _, text := range []string{"", "null", "[1]", "{", "hello"} {
		if r, _, err := s.record([]byte(text), now); err == nil || r.Body != text || r.Resource == nil {
			t.Errorf("%q: %+v %v", text, r, err)
		}
	}
}

func TestReadLine(t *testing.T) {
	r := bufio.NewReaderSize(strings.NewReader("ab\n\n"+strings.Repeat("x", 100)+"\nrest"), 16)
	for _, want := range []struct {
		text string
		cut  int
	}{{"ab", 0}, {"", 0}, {strings.Repeat("x", 30), 70}} {
		if text, cut, err := readLine(r, 30); err != nil || string(text) != want.text || cut != want.cut {
			t.Errorf("%q %d %v, want %v", text, cut, err, want)
		}
	}
	if _, _, err := readLine(r, 30); err == nil {
		t.Error("a line without its end")
	}
}

func FuzzRecord(f *testing.F) {
	f.Add([]byte(`{"MESSAGE":[104,[1]],"__CURSOR":"s=1","PRIORITY":"9","_PID":"-1","A":["b",[2]]}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, text []byte) {
		var s resources
		r, _, err := s.record(text, time.Unix(5, 0))
		if r == nil || r.Resource == nil || r.Time.IsZero() {
			t.Fatalf("%+v", r)
		}
		if err != nil && r.Body != string(text) {
			t.Errorf("%q became %q", text, r.Body)
		}
		if _, err := json.Marshal(r.Attributes); err != nil {
			t.Error(err)
		}
	})
}
