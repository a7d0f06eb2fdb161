package apptest

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestCollector: what a container writes can be searched, once, and the audit
// closes, whatever happens to the collector and to its backends.
func TestCollector(t *testing.T) {
	t.Parallel()
	bin := built
	if _, err := os.Stat(program("collector")); err != nil {
		bin = t.TempDir()
		cmd := exec.Command("go", "build", "-o", bin+string(filepath.Separator), "./collector", "./outrigger")
		cmd.Dir = filepath.Join("..", "..")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("the collector cannot be built: %v\n%s", err, out)
		}
	}
	for _, test := range []struct {
		name string
		run  func(*testing.T, *node)
	}{
		{"killed ten times it loses no line", killedTenTimes},
		{"a full disk stores nothing falsely", fullDisk},
		{"a dead output delays nothing", deadOutput},
		{"what is wrong is named", collectorRefuses},
		{"targets are scraped", targetsScraped},
		{"a request is explained", requestExplained},
	} {
		t.Run(strings.ReplaceAll(test.name, " ", "_"), func(t *testing.T) {
			t.Parallel()
			test.run(t, &node{bin: bin, dir: t.TempDir(), admin: freeAddress(t)})
		})
	}
}

// node is a folder of container logs and the collector that follows it.
type node struct {
	bin, dir, admin string
	process         *process
}

func (n *node) path(parts ...string) string {
	return filepath.Join(append([]string{n.dir}, parts...)...)
}

func (n *node) put(t *testing.T, name, text string) string {
	t.Helper()
	path := n.path(name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o750), os.WriteFile(path, []byte(text), 0o600)); err != nil {
		t.Fatal(err)
	}
	return path
}

// configure writes the configuration: a store, and what is given beside it.
func (n *node) configure(t *testing.T, logOutputs, more, outputs string) string {
	t.Helper()
	if err := os.MkdirAll(n.path("pods"), 0o750); err != nil {
		t.Fatal(err)
	}
	return n.put(t, "collector.yaml", fmt.Sprintf(`
admin: %s
dataDir: %s
node: n1
logs: {folder: %s, outputs: [%s]}
%s
outputs:
  local: {store: {folder: %s}}
%s`, n.admin, n.path("data"), n.path("pods"), logOutputs, more, n.path("store"), outputs))
}

// start runs the collector and waits until it is ready.
func (n *node) start(t *testing.T) {
	t.Helper()
	n.process = launch(t, "collector", filepath.Join(n.bin, "collector"), "--config", n.path("collector.yaml"))
	n.await(t)
}

func (n *node) await(t *testing.T) {
	t.Helper()
	eventually(t, 10*time.Second, func() string {
		n.process.running(t)
		if status, text := get("http://" + n.admin + "/ready"); status != http.StatusOK {
			return "the collector is not ready: " + text
		}
		return ""
	})
}

// ask runs the command line.
func (n *node) ask(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	var out, diag bytes.Buffer
	cmd := exec.Command(filepath.Join(n.bin, "outrigger"), append([]string{"--collector", n.admin}, args...)...)
	cmd.Stdout, cmd.Stderr = &out, &diag
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), diag.String(), cmd.ProcessState.ExitCode()
}

// sum is an account as the collector states it.
type sum struct {
	Written, Acknowledged, Pending int64
	Dropped                        map[string]int64
}

func (s sum) closes() bool {
	rest := s.Written - s.Acknowledged - s.Pending
	for _, n := range s.Dropped {
		rest -= n
	}
	return rest == 0
}

type account struct {
	Output, Breaker string
	Total           sum
	Files           []struct {
		Path string
		sum
	}
}

// audit returns the account of an output.
func (n *node) audit(t *testing.T, output string) account {
	t.Helper()
	stdout, stderr, code := n.ask(t, "logs", "audit", "-o", "json")
	var answer struct{ Outputs []account }
	if err := json.Unmarshal([]byte(stdout), &answer); err != nil || code != 0 {
		t.Fatalf("outrigger logs audit -o json: code %d, %v, %s", code, err, stderr)
	}
	for _, a := range answer.Outputs {
		if a.Output == output {
			if !a.Total.closes() {
				t.Errorf("the account of %s does not close: %+v", output, a.Total)
			}
			return a
		}
	}
	t.Fatalf("no account of %s in %s", output, stdout)
	return account{}
}

// containerLog is a log as a runtime writes it and kubelet rotates it.
type containerLog struct {
	t       *testing.T
	path    string
	file    *os.File
	written int64    // bytes, in all generations
	next    int      // number of the next line
	rotated []string // and not compressed

	generations, compressed int
}

func (n *node) container(t *testing.T, pod string) *containerLog {
	t.Helper()
	l := &containerLog{t: t, path: n.path("pods", "shop_"+pod+"_0d6e2b1c-5f53-4d0e-9a57-1f2a3b4c5d6e", "app", "0.log")}
	if err := os.MkdirAll(filepath.Dir(l.path), 0o750); err != nil {
		t.Fatal(err)
	}
	l.open()
	t.Cleanup(func() {
		if err := l.file.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// must fails the test and goes on: it may be called from any goroutine.
func (l *containerLog) must(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Error(err)
	}
}

func (l *containerLog) open() {
	l.t.Helper()
	var err error
	l.file, err = os.OpenFile(l.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	l.must(err)
	l.generations++
}

// write appends physical lines, in one write as a runtime does.
func (l *containerLog) write(lines ...string) {
	l.t.Helper()
	var b bytes.Buffer
	for _, text := range lines {
		b.WriteString(time.Now().UTC().Format("2006-01-02T15:04:05.000000000Z") + " " + text + "\n")
	}
	k, err := l.file.Write(b.Bytes())
	l.must(err)
	l.written += int64(k)
}

// number writes the next logical lines, each of which ends with " #<number>.":
// text, JSON, and every seventh in three parts with a line of the other stream
// among them.
func (l *containerLog) number(count int) {
	l.t.Helper()
	var lines []string
	for end := l.next + count; l.next < end; {
		switch {
		case l.next%7 == 0 && l.next+1 < end:
			lines = append(lines, "stdout P a long line ", fmt.Sprintf("stderr F between its parts #%d.", l.next+1), "stdout P that was cut", fmt.Sprintf("stdout F  in three #%d.", l.next))
			l.next += 2
		case l.next%2 == 0:
			lines = append(lines, fmt.Sprintf(`stdout F {"level":"info","message":"order shipped #%d.","order":{"id":%d}}`, l.next, l.next))
			l.next++
		default:
			lines = append(lines, fmt.Sprintf("stderr F WARN the cart is nearly full #%d.", l.next))
			l.next++
		}
	}
	l.write(lines...)
}

// rotate does what kubelet does: it renames the file, the runtime opens a new
// one a little later, and the generation before the last is compressed.
// compress says whether that may be done already.
func (l *containerLog) rotate(stamp time.Time, compress func(path string) bool) {
	l.t.Helper()
	to := l.path + "." + stamp.Format("20060102-150405")
	l.must(os.Rename(l.path, to))
	l.number(20) // into the old file, under its new name
	l.must(l.file.Close())
	l.open()
	l.rotated = append(l.rotated, to)
	for len(l.rotated) > 1 && compress(l.rotated[0]) {
		l.compress(l.rotated[0])
		l.rotated = l.rotated[1:]
		l.compressed++
	}
}

func (l *containerLog) compress(path string) {
	l.t.Helper()
	text, err := os.ReadFile(path)
	l.must(err)
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, err = z.Write(text)
	l.must(errors.Join(err, z.Close(), os.WriteFile(path+".tmp", b.Bytes(), 0o600), os.Rename(path+".tmp", path+".gz"), os.Remove(path)))
}

// numbers returns how often each number is found by searches that cover the
// time since begin.
func (n *node) numbers(t *testing.T, begin time.Time, count int) (times []int) {
	t.Helper()
	times = make([]int, count)
	const window = 2 * time.Second
	for from := begin.Add(-time.Second); from.Before(time.Now()); from = from.Add(window) {
		stdout, stderr, code := n.ask(t, "logs", "search", "#", "--limit", "10000", "-o", "json",
			"--from", from.UTC().Format(time.RFC3339Nano), "--to", from.Add(window).UTC().Format(time.RFC3339Nano))
		if code != 0 {
			t.Fatalf("search: %s", stderr)
		}
		if k := strings.Count(stdout, "\n"); k == 10000 {
			t.Fatalf("a search found %d lines, its limit: the test writes too fast", k)
		}
		for line := range strings.Lines(stdout) {
			var f struct{ Message string }
			if err := json.Unmarshal([]byte(line), &f); err != nil {
				t.Fatal(err)
			}
			_, text, ok := strings.Cut(f.Message, " #")
			i, err := strconv.Atoi(strings.TrimSuffix(text, "."))
			if !ok || err != nil || i >= count || !strings.HasSuffix(text, ".") {
				t.Fatalf("a line that nobody wrote: %q", f.Message)
			}
			times[i]++
		}
	}
	return times
}

// exactlyOnce fails the test where a number is missing or there twice.
func exactlyOnce(t *testing.T, times []int) {
	t.Helper()
	var missing, twice []int
	for i, k := range times {
		switch {
		case k == 0:
			missing = append(missing, i)
		case k > 1:
			twice = append(twice, i)
		}
	}
	if len(missing)+len(twice) > 0 {
		t.Errorf("of %d lines %d are missing (%.80v) and %d are there more than once (%.80v)", len(times), len(missing), missing, len(twice), twice)
	}
}

// killedTenTimes: lines are written and rotated without a pause while the
// collector is killed and started again.
func killedTenTimes(t *testing.T, n *node) {
	n.configure(t, "local", "", "")
	l := n.container(t, "cart-7d9c8b5f6d-x2vzq")
	begin := time.Now()
	stop, done := make(chan struct{}), make(chan struct{})
	// Kubelet compresses a generation at the next rotation, ten seconds later at
	// the earliest; here as soon as the checkpoint is past it.
	settled := func(path string) bool {
		info, err := os.Stat(path)
		if err != nil {
			t.Error(err)
			return false
		}
		b, err := os.ReadFile(n.path("data", "local.checkpoint"))
		_, text, _ := bytes.Cut(b, []byte("\n"))
		type place struct {
			Path   string
			Offset int64
		}
		var c struct{ Files []place }
		if err != nil || json.Unmarshal(text, &c) != nil {
			return false
		}
		return slices.Contains(c.Files, place{path, info.Size()})
	}
	go func() {
		defer close(done)
		rotate := 0
		for tick := time.NewTicker(20 * time.Millisecond); ; {
			select {
			case <-stop:
				tick.Stop()
				return
			case <-tick.C:
			}
			l.number(30)
			if rotate++; rotate%50 == 0 {
				l.rotate(begin.Add(time.Duration(rotate)*time.Second), settled)
			}
		}
	}()
	written := sync.OnceFunc(func() {
		close(stop)
		<-done
	})
	defer written()
	const kills = 10
	for range kills {
		n.process = launch(t, "collector", filepath.Join(n.bin, "collector"), "--config", n.path("collector.yaml"))
		time.Sleep(100*time.Millisecond + rand.N(1500*time.Millisecond))
		n.process.running(t)
		n.process.kill()
	}
	written()
	n.start(t)
	eventually(t, 20*time.Second, func() string {
		if s := n.audit(t, "local").Total; s.Pending > 0 || s.Written < l.written {
			return fmt.Sprintf("%d bytes were written, the account is %+v", l.written, s)
		}
		return ""
	})
	s := n.audit(t, "local").Total
	if s.Written != l.written || s.Acknowledged != l.written || len(s.Dropped) > 0 {
		t.Errorf("%d bytes were written; the account is %+v", l.written, s)
	}
	exactlyOnce(t, n.numbers(t, begin, l.next))
	t.Logf("%d kills, %d lines, %d bytes, %d generations, %d of them compressed", kills, l.next, l.written, l.generations, l.compressed)

	stdout, stderr, code := n.ask(t, "logs", "audit")
	if code != 0 {
		t.Errorf("outrigger logs audit ends with %d: %s", code, stderr)
	}
	mentions(t, "outrigger logs audit", stdout, "shop/cart-7d9c8b5f6d-x2vzq/app", "local", "total", fmt.Sprint(l.written), "adds up")
}

// fullDisk: the store cannot write, by a limit on the size of its files that is
// lifted again while the collector runs.
func fullDisk(t *testing.T, n *node) {
	n.configure(t, "local", "", "")
	l := n.container(t, "cart-7d9c8b5f6d-x2vzq")
	begin := time.Now()
	limited := func(blocks string) {
		t.Helper()
		n.process = launch(t, "collector", "/bin/sh", "-c", `ulimit -S -f "$0"; exec "$@"`, blocks, filepath.Join(n.bin, "collector"), "--config", n.path("collector.yaml"))
		n.await(t)
	}
	// Where not one byte can be written it starts, says so, and keeps the lines.
	l.number(10)
	limited("0")
	eventually(t, 5*time.Second, func() string {
		if a := n.audit(t, "local").Total; a.Written != l.written || a.Pending != l.written {
			return fmt.Sprintf("%d bytes are written, the account is %+v", l.written, a)
		}
		return ""
	})
	mentions(t, "the log", n.process.stderr.String(), "cannot save the checkpoint", n.path("data"), "move dataDir")
	n.process.kill()
	limited("4096") // of 512 bytes
	var s sum
	eventually(t, 15*time.Second, func() string {
		l.number(50)
		if !strings.Contains(n.process.stderr.String(), "cannot ship logs") {
			return "the collector has not said that it cannot ship"
		}
		return ""
	})
	mentions(t, "the log", n.process.stderr.String(), n.path("store"), "free space", "nothing is lost")
	l.number(500)
	eventually(t, 5*time.Second, func() string {
		if s = n.audit(t, "local").Total; s.Written != l.written {
			return fmt.Sprintf("%d bytes are written, the account is %+v", l.written, s)
		}
		return ""
	})
	n.process.running(t)
	if s.Pending == 0 || len(s.Dropped) > 0 {
		t.Errorf("with a full disk the account is %+v", s)
	}
	// Searching goes on, and what is not acknowledged may be found, but what is
	// acknowledged must be.
	found := int64(0)
	for _, k := range n.numbers(t, begin, l.next) {
		found += int64(k)
	}
	if records := int64(metric(t, n.admin, "outrigger_log_records_total", `result="acknowledged"`)); found < records || records == 0 {
		t.Errorf("%d records are acknowledged and %d can be found", records, found)
	}
	if out, err := exec.Command("prlimit", "--pid", strconv.Itoa(n.process.cmd.Process.Pid), "--fsize=unlimited").CombinedOutput(); err != nil {
		t.Logf("the limit cannot be lifted from a running program (%v: %s): starting it anew", err, out)
		n.process.stop(t)
		n.start(t)
	}
	eventually(t, 30*time.Second, func() string {
		if s = n.audit(t, "local").Total; s.Pending > 0 {
			return fmt.Sprintf("with space again the account is %+v", s)
		}
		return ""
	})
	if s.Acknowledged != l.written {
		t.Errorf("%d bytes were written; the account is %+v", l.written, s)
	}
	exactlyOnce(t, n.numbers(t, begin, l.next))
}

// deadOutput: beside an Elasticsearch that does not answer, a line is searchable
// in less than two seconds while 2,000 others a second are written.
func deadOutput(t *testing.T, n *node) {
	nobody := freeAddress(t)
	n.configure(t, "dead, local", "", "  dead: {elasticsearch: {addresses: [http://"+nobody+"]}}\n")
	l := n.container(t, "cart-7d9c8b5f6d-x2vzq")
	probes := n.container(t, "probe-0")
	n.start(t)
	begin := time.Now()
	var load sync.WaitGroup
	stop := make(chan struct{})
	load.Go(func() {
		tick := time.NewTicker(25 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
			}
			// By the clock, so that a slow machine writes as much.
			if due := int(time.Since(begin).Seconds() * 2000); due > l.next {
				l.number(due - l.next)
			}
		}
	})
	loaded := sync.OnceFunc(func() {
		close(stop)
		load.Wait()
	})
	defer loaded()
	var slowest, total time.Duration
	const samples = 20
	for i := range samples {
		time.Sleep(150 * time.Millisecond)
		word := fmt.Sprintf("probe%d", i)
		written := time.Now()
		probes.write("stdout F INFO the " + word + " of latency")
		eventually(t, 10*time.Second, func() string {
			if _, text := get("http://" + n.admin + "/api/v1/logs?since=1m&query=" + word); !strings.Contains(text, word+" of latency") {
				return word + " cannot be found"
			}
			return ""
		})
		took := time.Since(written)
		slowest, total = max(slowest, took), total+took
	}
	loaded()
	rate := float64(l.next) / time.Since(begin).Seconds()
	t.Logf("searchable after %s on average, %s at most, at %.0f lines/s", (total / samples).Round(time.Millisecond), slowest.Round(time.Millisecond), rate)
	if slowest > 2*time.Second {
		t.Errorf("a line was searchable after %s", slowest)
	}
	if rate < 1500 {
		t.Errorf("%.0f lines/s were written, want about 2000", rate)
	}

	eventually(t, 5*time.Second, func() string {
		if s := n.audit(t, "local").Total; s.Pending > 0 || s.Acknowledged != l.written+probes.written {
			return fmt.Sprintf("%d bytes were written, the account of the store is %+v", l.written+probes.written, s)
		}
		return ""
	})
	var dead account
	eventually(t, 2*time.Second, func() string {
		if dead = n.audit(t, "dead"); dead.Total.Pending != l.written+probes.written || dead.Total.Acknowledged != 0 || len(dead.Total.Dropped) > 0 {
			return fmt.Sprintf("%d bytes were written, the account of the dead output is %+v", l.written+probes.written, dead.Total)
		}
		return ""
	})
	eventually(t, 15*time.Second, func() string {
		if a := n.audit(t, "dead"); a.Breaker != "open" {
			return "the breaker of the dead output is " + a.Breaker
		}
		if state := metric(t, n.admin, "outrigger_output_breaker_state", `output="dead"`); state != 2 {
			return fmt.Sprintf("the metric of the dead output's breaker is %d", state)
		}
		if p := metric(t, n.admin, "outrigger_log_pending_bytes", `output="dead"`); int64(p) != dead.Total.Pending {
			return fmt.Sprintf("the metric of what is pending is %d, the audit says %d", p, dead.Total.Pending)
		}
		return ""
	})
	if state := metric(t, n.admin, "outrigger_output_breaker_state", `output="local"`); state != 0 {
		t.Errorf("the store's breaker is at %d", state)
	}
	mentions(t, "the log", n.process.stderr.String(), "cannot ship logs", nobody, "connection refused")
	stdout, stderr, code := n.ask(t, "logs", "audit")
	if code != 0 {
		t.Errorf("outrigger logs audit ends with %d: %s", code, stderr)
	}
	mentions(t, "outrigger logs audit", stdout, "dead", "breaker open", fmt.Sprint(dead.Total.Pending), "adds up")

	kilobytes := resident(t, n.process)
	t.Logf("the collector has %d MiB resident with two outputs", kilobytes>>10)
	if kilobytes > 60<<10 {
		t.Errorf("the collector has %d MiB resident, want at most 60", kilobytes>>10)
	}
	if traces, _, _ := n.ask(t, "why", "4bf92f3577b34da6a3ce929d0e0e4736"); traces != "" {
		t.Errorf("why explains a trace that nobody has seen:\n%s", traces)
	}
}

// resident returns the memory of a process in KiB.
func resident(t *testing.T, p *process) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "VmRSS:" {
			k, err := strconv.Atoi(f[1])
			if err != nil {
				t.Fatal(err)
			}
			return k
		}
	}
	t.Fatalf("no VmRSS in %s", b)
	return 0
}

// collectorRefuses: what is wrong is named with its place and the remedy, and
// the collector does not start.
func collectorRefuses(t *testing.T, n *node) {
	busy := taken(t)
	f := func(text string, words ...string) {
		t.Helper()
		p := launch(t, "collector", filepath.Join(n.bin, "collector"), "--config", n.put(t, "bad.yaml", text))
		if code := p.exits(t); code != 1 {
			t.Errorf("the collector ended with %d, want 1", code)
		}
		mentions(t, "its last word", p.stderr.String(), words...)
	}
	metrics := "metrics: {expose: " + freeAddress(t) + "}\n"
	rest := "admin: " + freeAddress(t) + "\ndataDir: " + n.path("data") + "\n" + metrics
	f("logs: [\n", "bad.yaml", "yaml", "line 1")
	f(rest+"outptus: {}\n", "bad.yaml", "line 4", `unknown key "outptus"`, "outputs")
	f(rest+"logs: {outputs: [local]}\noutputs: {local: {store: {folder: /x, retain: 1h}}}\n", "line 5", `unknown key "retain"`, "retention")
	f(rest+"logs: {outputs: [lokal]}\noutputs: {local: {store: {folder: /x}}}\n", `logs.outputs: there is no output "lokal"`, "local")
	f(rest+"logs: {outputs: [local]}\noutputs: {local: {store: {}}}\n", "outputs.local: store: folder is empty", "name a folder")
	f(rest+"logs: {outputs: [es]}\noutputs: {es: {elasticsearch: {addresses: [es:9200]}}}\n", "outputs.es: elasticsearch: addresses", "https://localhost:9200")
	f("admin: "+busy+"\ndataDir: "+n.path("data")+"\n"+metrics, "admin: "+busy+" is in use", "another port")
	f("admin: "+freeAddress(t)+"\ndataDir: "+n.path("data")+"\nmetrics: {expose: "+busy+"}\n", "metrics.expose: "+busy+" is in use", "another port")
	f("admin: 0.0.0.0:15030\n"+metrics, "admin: ", "loopback", "127.0.0.1:15030")
	f("admin: "+freeAddress(t)+"\ndataDir: /proc/nowhere\n"+metrics, "dataDir: /proc/nowhere", "name a folder")

	n.configure(t, "local", "", "")
	n.start(t)
	f(strings.Replace("admin: A\ndataDir: "+n.path("data")+"\n"+metrics, "A", freeAddress(t), 1), n.path("data")+" is in use by another collector", "another folder")
	n.process.running(t)
}

// targetsScraped: the exposition has the node's metrics and those of the
// targets; one that is dead is up 0, with the reason.
func targetsScraped(t *testing.T, n *node) {
	target := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4")
		fmt.Fprint(w, "# TYPE requests_total counter\nrequests_total{code=\"200\",job=\"inner\"} 7\n")
	}))
	defer target.Close()
	alive, dead, expose := target.Listener.Addr().String(), freeAddress(t), freeAddress(t)
	n.configure(t, "local", fmt.Sprintf("metrics: {host: true, expose: %s, scrape: [{job: shop, address: %s, interval: 1s}, {job: gone, address: %s, interval: 1s}, {job: shop, address: %s, path: /, scheme: https, interval: 1s}]}",
		expose, alive, dead, alive), "")
	n.start(t)
	eventually(t, 10*time.Second, func() string {
		_, text := get("http://" + expose + "/metrics")
		for _, line := range []string{
			`requests_total{code="200",exported_job="inner",instance="` + alive + `",job="shop"} 7`,
			`up{instance="` + dead + `",job="gone"} 0`,
			"node_load1 ",
		} {
			if !strings.Contains(text, "\n"+line) {
				return line + " is not in the exposition"
			}
		}
		if k := metric(t, expose, "outrigger_scrape_failures_total", `job="gone"`, `reason="connect"`); k == 0 {
			return "no failed scrape of job gone is counted"
		}
		if k := metric(t, n.admin, "outrigger_scrape_failures_total", `job="shop"`); k == 0 {
			return "no failed scrape of job shop is counted"
		}
		return ""
	})
	mentions(t, "the log", n.process.stderr.String(), "scrape fails", dead, "connection refused")
}

// requestExplained: one id finds what the sidecar and the applications wrote of
// a request, in order, and what its flags mean; columns stand under one another.
func requestExplained(t *testing.T, n *node) {
	const trace, request = "4bf92f3577b34da6a3ce929d0e0e4736", "7e1c9a52-0b1f-4d0e-9a57-1f2a3b4c5d6e"
	n.configure(t, "local", "", "")
	n.start(t)
	// As the sidecar's access log writes it.
	access := func(at time.Time, service, direction, flags, more string, status int) string {
		return fmt.Sprintf(`stdout F {"@timestamp":%q,"log.level":"warn","message":"POST /pay -> %d %s","event.dataset":"outrigger.access","service.name":%q,"outrigger.direction":%q,`+
			`"http.request.method":"POST","url.path":"/pay","http.request.id":%q,"http.response.status_code":%d,"outrigger.response_flags":%q,"event.duration":3000000,"outrigger.destination":"shop/payments:80","trace.id":%q,"span.id":"00f067aa0ba902b7"%s}`,
			at.UTC().Format("2006-01-02T15:04:05.000000Z"), status, flags, service, direction, request, status, flags, trace, more)
	}
	begin := time.Now().Add(-time.Second)
	n.container(t, "storefront-7d9c8b5f6d-x2vzq").write(
		access(begin.Add(3*time.Millisecond), "storefront", "outbound", "UO", `,"error.message":"circuit breaker shop/payments is open"`, 503),
		"stdout F another request")
	n.container(t, "recommendations-0").write(
		fmt.Sprintf(`stdout F {"time":%q,"level":"error","msg":"card \u001b[31mdeclined\u001b[0m","trace_id":%q}`, begin.Add(2*time.Millisecond).UTC().Format(time.RFC3339Nano), strings.ToUpper(trace)),
		"stderr F level=warn trace_id="+trace+" msg=logfmt",
		fmt.Sprintf(`stdout F {"@timestamp":%q,"log.level":"warn","message":"circuit breaker shop/payments opened","event.dataset":"outrigger.breaker","outrigger.evidence.id":"br-7f3a","outrigger.breaker.policy":"shop/payments","outrigger.breaker.mode":"Enforce",`+
			`"outrigger.breaker.from":"closed","outrigger.breaker.state":"open","outrigger.breaker.reason":"failure ratio 0.62 >= 0.50 over 10s (31 of 50)","outrigger.destination":"shop/payments:80","service.name":"storefront","service.node.name":"storefront-0",`+
			`"outrigger.evidence.requests":[{"@timestamp":%[1]q,"trace.id":%q,"http.request.method":"POST","url.path":"/pay","destination.address":"10.0.0.7:8080","http.response.status_code":500,"outrigger.response_flags":"-","event.duration":12345678,"outrigger.failure":true,"outrigger.slow":false}]}`,
			begin.UTC().Format(time.RFC3339Nano), trace))
	var stdout string
	eventually(t, 10*time.Second, func() string {
		if stdout, _, _ = n.ask(t, "why", trace); strings.Count(stdout, "trace.id="+trace) != 3 {
			return "the trace has not 3 records:\n" + stdout
		}
		return ""
	})
	mentions(t, "outrigger why <trace id>", stdout, "3 records", "recommendations error card declined trace.id=", "[outbound shop/payments:80]",
		"UO: a circuit breaker or limit rejected the call (circuit breaker shop/payments is open)")
	if at := strings.Index(stdout, "declined"); at > strings.Index(stdout, "POST /pay") || at > strings.Index(stdout, "logfmt") {
		t.Errorf("the records are not in the order of time:\n%s", stdout)
	}
	stdout, stderr, _ := n.ask(t, "why", request)
	mentions(t, "outrigger why <request id>", stdout+stderr, "1 records", "storefront", "POST /pay -> 503 UO")
	stdout, stderr, _ = n.ask(t, "why", "br-7f3a")
	mentions(t, "outrigger why <evidence id>", stdout+stderr, "closed -> OPEN", "31 of 50", "POST /pay", "10.0.0.7:8080", "12.35ms", "outrigger why "+trace)

	stdout, _, _ = n.ask(t, "logs", "search", "trace.id:"+trace)
	column := -1
	for line := range strings.Lines(stdout) {
		at := -1
		for _, message := range []string{"card", "POST", "level=warn"} {
			if i := strings.Index(line, " "+message); i >= 0 {
				at = i
			}
		}
		if column >= 0 && at != column || at < 0 {
			t.Errorf("the messages do not stand under one another:\n%s", stdout)
			break
		}
		column = at
	}
	if strings.Contains(stdout, "\x1b") {
		t.Errorf("an escape sequence reaches the terminal: %q", stdout)
	}
}
