package torture

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"text/template"
	"time"
)

// collector is the collector under test: a process that is made from a
// configuration, killed, stopped and started again.
type collector struct {
	command []string // program and arguments
	admin   string   // address of its admin endpoint; empty for others'
	log     string   // file of what it says
	limit   int      // KiB that one file may have; 0 is no limit

	mu       sync.Mutex
	cmd      *exec.Cmd
	done     chan struct{}
	expected bool // its end was asked for
	away     time.Time
	absences []absence
	crashes  []string
}

// settings are what a configuration's template may name.
type settings struct {
	Logs    string // the folder that is laid out as /var/log/pods
	Data    string // the folder for checkpoints
	Backend string // address of the backend
	Output  string // our own output, one line of YAML
	Admin   string // address for an admin endpoint
	Config  string // path of the configuration file, for the command
}

// spoolLine keeps second names of files, as the chart has it done.
const spoolLine = "  spool: {{.Data}}/spool\n"

// ourConfig is what our collector is tortured with.
const ourConfig = `admin: {{.Admin}}
dataDir: {{.Data}}
node: torture
cluster: torture
logs:
  folder: {{.Logs}}
` + spoolLine + `  outputs: [o]
  batch: {linger: 50ms}
outputs:
  o: { {{.Output}} }
`

// freeAddress is a loopback address on which nobody listened a moment ago.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// configure writes the configuration and returns the collector, not started.
func configure(dir, command, config string, s settings, ours bool) (*collector, error) {
	s.Config = filepath.Join(dir, "collector.yaml")
	text, err := fill("configuration", config, s)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(s.Config, text, 0o600); err != nil {
		return nil, err
	}
	line, err := fill("command", command, s)
	if err != nil {
		return nil, err
	}
	c := &collector{command: strings.Fields(string(line)), log: filepath.Join(dir, "collector.log")}
	if len(c.command) == 0 {
		return nil, errors.New("--collector-command is empty")
	}
	if ours {
		c.admin = s.Admin
	}
	return c, nil
}

func fill(name, text string, s settings) ([]byte, error) {
	t, err := template.New(name).Option("missingkey=error").Parse(text)
	if err != nil {
		return nil, fmt.Errorf("the template of the %s: %w", name, err)
	}
	var b bytes.Buffer
	if err := t.Execute(&b, s); err != nil {
		return nil, fmt.Errorf("the template of the %s: %w", name, err)
	}
	return b.Bytes(), nil
}

// start runs the process. It is harmless when it runs.
func (c *collector) start() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.startLocked()
}

func (c *collector) startLocked() error {
	if c.cmd != nil {
		return nil
	}
	log, err := os.OpenFile(c.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }() // the child has its own
	args := c.command
	if c.limit > 0 {
		args = append([]string{"sh", "-c", "ulimit -f " + strconv.Itoa(c.limit*2) + `; exec "$0" "$@"`}, args...)
	}
	cmd := exec.Command(args[0], args[1:]...) //nolint:gosec // the command is the user's own; kill and end stop it
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the collector: %w", err)
	}
	done := make(chan struct{})
	c.cmd, c.done, c.expected = cmd, done, false
	if !c.away.IsZero() {
		c.absences = append(c.absences, absence{c.away, time.Now()})
		c.away = time.Time{}
	}
	go func() {
		err := cmd.Wait()
		c.mu.Lock()
		defer c.mu.Unlock()
		if !c.expected {
			c.crashes = append(c.crashes, fmt.Sprintf("%v: %s", err, c.tailOfLog()))
			c.away = time.Now()
		}
		c.cmd = nil
		close(done)
	}()
	return nil
}

// ensure starts it anew if it has ended by itself, as kubelet does.
func (c *collector) ensure() error { return c.start() }

// kill is SIGKILL. It returns when the process is gone.
func (c *collector) kill() { c.end(syscall.SIGKILL, time.Minute) }

// end sends the signal and waits. It says whether the process ended by it.
func (c *collector) end(sig syscall.Signal, patience time.Duration) bool {
	c.mu.Lock()
	cmd, done := c.cmd, c.done
	if cmd == nil {
		c.mu.Unlock()
		return true
	}
	c.expected = true
	c.away = time.Now()
	_ = cmd.Process.Signal(sig) // it may have ended
	c.mu.Unlock()
	select {
	case <-done:
		return true
	case <-time.After(patience):
		_ = cmd.Process.Kill() // it may have ended
		<-done
		return false
	}
}

// pause is SIGSTOP, resume SIGCONT.
func (c *collector) pause() { c.signal(syscall.SIGSTOP) }

func (c *collector) resume() { c.signal(syscall.SIGCONT) }

func (c *collector) signal(sig syscall.Signal) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cmd == nil {
		return
	}
	if sig == syscall.SIGSTOP {
		// What it was about to read when it was stopped counts as seen.
		_ = c.cmd.Process.Signal(sig) // it may have ended
		c.away = time.Now()
		return
	}
	c.absences = append(c.absences, absence{c.away, time.Now()})
	c.away = time.Time{}
	_ = c.cmd.Process.Signal(sig) // it may have ended
}

func (c *collector) report() (absences []absence, crashes []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]absence(nil), c.absences...), append([]string(nil), c.crashes...)
}

func (c *collector) tailOfLog() string {
	b, err := os.ReadFile(c.log)
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-800):])
}

// account is what the collector says of itself at /api/v1/audit.
type account struct {
	Written      int64            `json:"written"`
	Acknowledged int64            `json:"acknowledged"`
	Dropped      map[string]int64 `json:"dropped"`
	Pending      int64            `json:"pending"`
}

func (a account) dropped() (n int64) {
	for _, v := range a.Dropped {
		n += v
	}
	return n
}

// off is by how much the account does not close.
func (a account) off() int64 { return a.Written - a.Acknowledged - a.dropped() - a.Pending }

// maxAccount bounds an answer: some 100,000 files.
const maxAccount = 64 << 20

// audit asks our own collector; the sum of its outputs.
func (c *collector) audit(ctx context.Context) (sum account, err error) {
	if c.admin == "" {
		return sum, errors.New("this collector gives no account")
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+c.admin+"/api/v1/audit", nil)
	if err != nil {
		return sum, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return sum, err
	}
	defer func() { _ = resp.Body.Close() }() // it was read
	var answer struct {
		Outputs []struct {
			Total account `json:"total"`
		} `json:"outputs"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAccount)).Decode(&answer); err != nil {
		return sum, fmt.Errorf("the audit: %w", err)
	}
	sum.Dropped = map[string]int64{}
	for _, o := range answer.Outputs {
		sum.Written += o.Total.Written
		sum.Acknowledged += o.Total.Acknowledged
		sum.Pending += o.Total.Pending
		for cause, n := range o.Total.Dropped {
			sum.Dropped[cause] += n
		}
	}
	return sum, nil
}

// unnamedMetric counts records that an OTLP receiver rejected without saying which:
// no account in bytes can hold them.
const unnamedMetric = "outrigger_otlp_rejected_records_total"

// unnamed is how many records the collector counts so since it was started.
func (c *collector) unnamed(ctx context.Context) (n int, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+c.admin+"/metrics", nil)
	if err != nil {
		return 0, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer func() { _ = resp.Body.Close() }() // it was read
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAccount))
	if err != nil {
		return 0, fmt.Errorf("the metrics: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		if !strings.HasPrefix(line, unnamedMetric) {
			continue
		}
		f := strings.Fields(line)
		v, err := strconv.ParseFloat(f[len(f)-1], 64)
		if err != nil {
			return 0, fmt.Errorf("the metrics: %w", err)
		}
		n += int(v)
	}
	return n, nil
}

// ready waits until it serves its admin endpoint, or for others a moment.
func (c *collector) ready(ctx context.Context) error {
	if c.admin == "" {
		select {
		case <-time.After(time.Second):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	for deadline := time.Now().Add(20 * time.Second); ; {
		_, err := c.audit(ctx)
		if err == nil || ctx.Err() != nil {
			return ctx.Err()
		}
		if _, crashes := c.report(); len(crashes) > 0 {
			return fmt.Errorf("the collector ended: %s", crashes[0])
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the collector does not serve %s: %w", c.admin, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
