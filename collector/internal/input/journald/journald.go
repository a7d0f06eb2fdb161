// Package journald follows the journal of systemd (kubelet, containerd, sshd, the
// kernel) and writes its entries to the collector's own journal.
//
// The format of the journal's files belongs to systemd, so its own program reads
// them: journalctl --output=json --follow, a child of the collector. The cursor of
// the last entry that is on the disk is kept in a file; a restart goes on after it.
//
// It knows the fields of an entry (systemd.journal-fields(7)) and how the Elastic
// Common Schema calls them. Metadata of the journal that it has no name for is not
// sent (_CAP_EFFECTIVE, _SELINUX_CONTEXT, ...); fields that programs set themselves
// are, as journald.custom.<name>.
package journald

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/outrigger-mesh/outrigger/atomicfile"
	"github.com/outrigger-mesh/outrigger/collector/internal/input/journal"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Defaults and limits.
const (
	DefaultBinary = "journalctl"
	DefaultSince  = time.Hour
	// maxEntry bytes of one entry in JSON are read; the rest is cut and counted.
	maxEntry = 4 << 20
	// maxBatch entries, or maxBytes of them, are written at a time, and at the latest
	// after linger.
	maxBatch = 256
	maxBytes = 1 << 20
	linger   = 200 * time.Millisecond
	// Waits before the child is started again and before a full journal is tried again.
	minBackoff = time.Second
	maxBackoff = time.Minute
	// stopWithin is how long the child may take to end.
	stopWithin = 3 * time.Second
	maxStderr  = 4 << 10
	maxCursor  = 4 << 10
)

// Config of an Input.
type Config struct {
	// Binary is journalctl, or its path.
	Binary string
	// Directory of the journal's files, where it is not the system's own; such as the
	// host's /var/log/journal mounted into a container.
	Directory string
	// Namespace of journald; empty for the default one.
	Namespace string
	// Units whose entries are read; none for all.
	Units []string
	// Since is how far back the first start goes, while there is no cursor. Default 1 h.
	Since time.Duration
	// CursorFile keeps the place.
	CursorFile    string
	Cluster, Node string
	Journal       *journal.Writer
	Log           *slog.Logger
	Registerer    prometheus.Registerer
}

// Input runs journalctl.
type Input struct {
	cfg       Config
	binary    string
	backoff   time.Duration // the first
	resource  resources
	starts    prometheus.Counter
	malformed prometheus.Counter
}

// New finds journalctl. Run starts it.
func New(cfg Config) (*Input, error) {
	cfg.Binary, cfg.Since = cmp.Or(cfg.Binary, DefaultBinary), cmp.Or(cfg.Since, DefaultSince)
	if cfg.Journal == nil || cfg.CursorFile == "" {
		return nil, errors.New("journald: no journal to write to, or no file for the cursor")
	}
	if cfg.Since < 0 {
		return nil, fmt.Errorf("journald: since is %s: write how far back to go, such as 1h", cfg.Since)
	}
	for _, u := range cfg.Units {
		if u == "" || strings.ContainsAny(u, "\x00\n") {
			return nil, fmt.Errorf("journald: units: %q is not a unit: write it as kubelet.service", u)
		}
	}
	binary, err := exec.LookPath(cfg.Binary)
	if err != nil {
		return nil, fmt.Errorf("journald: %w: the journal is read by systemd's own program; use an image that has it, or leave the input out", err)
	}
	in := &Input{
		cfg: cfg, binary: binary, backoff: minBackoff, resource: resources{cluster: cfg.Cluster, node: cfg.Node},
		starts:    prometheus.NewCounter(prometheus.CounterOpts{Name: "outrigger_journald_starts_total", Help: "Starts of journalctl; more than one mean that it ended."}),
		malformed: prometheus.NewCounter(prometheus.CounterOpts{Name: "outrigger_journald_malformed_entries_total", Help: "Entries that are not what journalctl should write. They are shipped as they are."}),
	}
	if cfg.Registerer != nil {
		if err := errors.Join(cfg.Registerer.Register(in.starts), cfg.Registerer.Register(in.malformed)); err != nil {
			return nil, err
		}
	}
	return in, nil
}

// Run follows the journal until ctx ends. A child that ends is started again.
func (in *Input) Run(ctx context.Context) error {
	backoff := in.backoff
	for ctx.Err() == nil {
		in.starts.Inc()
		taken, err := in.follow(ctx)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // it ended because it was to
		}
		if errors.Is(err, journal.ErrClosed) {
			return nil // the collector ends
		}
		in.cfg.Log.Warn("journalctl ended; it is started again", "error.message", fmt.Sprint(err), "outrigger.wait", backoff.String())
		if taken > 0 {
			backoff = in.backoff
		}
		pause(ctx, backoff)
		backoff = min(2*backoff, maxBackoff)
	}
	return nil
}

// args of journalctl.
func (in *Input) args() ([]string, error) {
	// Without --all a field of more than 4 KiB is null.
	args := []string{"--output=json", "--all", "--follow", "--no-tail", "--quiet"}
	if in.cfg.Directory != "" {
		args = append(args, "--directory="+in.cfg.Directory)
	}
	if in.cfg.Namespace != "" {
		args = append(args, "--namespace="+in.cfg.Namespace)
	}
	for _, u := range in.cfg.Units {
		args = append(args, "--unit="+u)
	}
	cursor, err := in.cursor()
	if err != nil {
		return nil, err
	}
	if cursor != "" {
		return append(args, "--after-cursor="+cursor), nil
	}
	since := time.Now().Add(-in.cfg.Since)
	if info, err := os.Stat(in.cfg.CursorFile + damaged); err == nil && info.ModTime().Before(since) {
		since = info.ModTime() // when it was last written: rather twice than never
	}
	return append(args, fmt.Sprintf("--since=@%d", since.Unix())), nil
}

const damaged = ".damaged"

func (in *Input) cursor() (string, error) {
	b, err := os.ReadFile(in.cfg.CursorFile)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("the cursor: %w", err)
	}
	text := string(b)
	if cursor, ok := strings.CutSuffix(text, "\n"); ok && validCursor(cursor) {
		return cursor, nil
	}
	return "", in.setAside(fmt.Sprintf("%.100q is no cursor", text))
}

// validCursor as systemd writes them: s=...;i=...;b=...;m=...;t=...;x=...
func validCursor(s string) bool {
	return s != "" && len(s) <= maxCursor && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' })
}

func (in *Input) setAside(why string) error {
	in.cfg.Log.Warn("the cursor of the journal cannot be used; it is set aside, and entries may come twice", "file.path", in.cfg.CursorFile+damaged, "error.message", why)
	return os.Rename(in.cfg.CursorFile, in.cfg.CursorFile+damaged)
}

func (in *Input) keep(cursor string) error {
	if err := atomicfile.Write(in.cfg.CursorFile, []byte(cursor+"\n"), 0o600); err != nil {
		return fmt.Errorf("the cursor: %w", err)
	}
	return nil
}

// entry is one line of journalctl.
type entry struct {
	text []byte
	cut  int
}

// follow runs one child, and returns how many entries it took and why it ended.
func (in *Input) follow(ctx context.Context) (taken int, err error) {
	args, err := in.args()
	if err != nil {
		return 0, err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	cmd := exec.CommandContext(ctx, in.binary, args...) //nolint:gosec // the configuration names the program
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = stopWithin
	cmd.Env = []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	stderr := &head{}
	cmd.Stderr = stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", in.binary, err)
	}
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("start %s: %w", in.binary, err)
	}
	entries := make(chan entry) // no queue: journalctl waits, and the journal is on the disk
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer close(entries)
		r := bufio.NewReaderSize(out, 64<<10)
		for {
			text, cut, err := readLine(r, maxEntry)
			if err != nil { // the child ended; a line without its end comes again after the cursor
				return
			}
			select {
			case entries <- entry{text, cut}:
			case <-ctx.Done():
				return
			}
		}
	}()
	taken, failed := in.take(ctx, entries)
	stop()
	<-done
	err = cmd.Wait()
	if failed != nil {
		return taken, failed
	}
	if text := stderr.String(); text != "" {
		if taken == 0 && strings.Contains(strings.ToLower(text), "cursor") {
			if e := in.setAside(text); e != nil && !errors.Is(e, fs.ErrNotExist) {
				return 0, e
			}
		}
		return taken, fmt.Errorf("%s: %w: %s", in.binary, cmp.Or(err, errEnded), text)
	}
	return taken, fmt.Errorf("%s: %w", in.binary, cmp.Or(err, errEnded))
}

var errEnded = errors.New("it ended by itself")

// take writes entries to the journal in batches, and the cursor after each.
func (in *Input) take(ctx context.Context, entries <-chan entry) (taken int, err error) {
	var batch []*record.Record
	size, cursor := 0, ""
	timer := time.NewTimer(linger)
	defer timer.Stop()
	flush := func() error {
		if len(batch) == 0 {
			return nil
		}
		if err := in.append(ctx, batch); err != nil {
			return err
		}
		taken += len(batch)
		batch, size = nil, 0
		if cursor == "" {
			return nil
		}
		return in.keep(cursor)
	}
	for {
		select {
		case e, ok := <-entries:
			if !ok {
				return taken, flush()
			}
			if len(batch) == 0 {
				timer.Reset(linger)
			}
			rec, at, err := in.resource.record(e.text, time.Now())
			if err != nil {
				in.malformed.Inc()
			}
			rec.TruncatedBytes += e.cut
			if validCursor(at) {
				cursor = at
			}
			batch = append(batch, rec)
			if size += len(e.text); len(batch) >= maxBatch || size >= maxBytes {
				if err := flush(); err != nil {
					return taken, err
				}
			}
		case <-timer.C:
			if err := flush(); err != nil {
				return taken, err
			}
		case <-ctx.Done():
			return taken, ctx.Err()
		}
	}
}

// append writes to the journal and waits while that is full.
func (in *Input) append(ctx context.Context, batch []*record.Record) error {
	wait := in.backoff
	for {
		err := in.cfg.Journal.Append(ctx, batch)
		if err == nil || ctx.Err() != nil || errors.Is(err, journal.ErrClosed) {
			return err
		}
		pause(ctx, wait)
		wait = min(2*wait, maxBackoff)
	}
}

// readLine returns the next line without its end, at most limit bytes of it, and
// how many more it had.
func readLine(r *bufio.Reader, limit int) (text []byte, cut int, err error) {
	for {
		part, err := r.ReadSlice('\n')
		end := err == nil
		if end {
			part = part[:len(part)-1]
		}
		n := min(len(part), limit-len(text))
		text = append(text, part[:n]...)
		cut += len(part) - n
		if end {
			return text, cut, nil
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return nil, 0, err
		}
	}
}

// head keeps the first bytes of what a child complains of. The child's goroutine
// writes it; it is read after Wait.
type head struct{ b bytes.Buffer }

var _ io.Writer = (*head)(nil)

func (h *head) Write(p []byte) (int, error) {
	h.b.Write(p[:min(len(p), maxStderr-h.b.Len())])
	return len(p), nil
}

func (h *head) String() string { return strings.TrimSpace(h.b.String()) }

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
