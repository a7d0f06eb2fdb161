package torture

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// scenario is one thing that happens to collectors. It writes and breaks; that
// everything is mended and settled afterwards is the runner's.
type scenario struct {
	name string
	what string
	run  func(context.Context, *world) error
}

// skipped is an error of a scenario that cannot be done here.
type skipped struct{ reason string }

func (s skipped) Error() string { return s.reason }

// scenarios are all, in the order of the table.
func scenarios() []scenario {
	return []scenario{
		{"steady", "lines of several pods, streams and parts; nothing breaks", steady},
		{"rotate-1-stopped", "one rotation while the collector is stopped", rotateStopped(0, 1)},
		{"rotate-2-stopped", "two rotations while the collector is stopped", rotateStopped(0, 2)},
		{"rotate-5-stopped", "five rotations while the collector is stopped: kubelet deletes some", rotateStopped(0, 5)},
		{"silent", "files silent for more than a minute are written to, rotated and compressed while the collector is stopped", rotateStopped(95*time.Second, 3)},
		{"rotate-2-down", "two rotations while the backend is down", rotateDown(2)},
		{"rotate-5-down", "five rotations while the backend is down: kubelet deletes some", rotateDown(5)},
		{"gz", "the collector starts when older generations are gzipped", gz},
		{"rotate-fast", "rotations in quick succession under load", rotateFast},
		{"copytruncate", "the file is emptied in place, read and unread", copytruncate},
		{"inode-reuse", "another container's file gets the inode of one that was read", inodeReuse},
		{"pod-deleted", "pods go with unread lines while the backend is down", podDeleted},
		{"pods-200ms", "pods that live for 200 ms", shortPods},
		{"sigkill", "SIGKILL at random under load and rotation", sigkill},
		{"enospc", "the data folder is full, and has room again", enospc},
		{"busy", "the backend answers 429 and 503", faulty(fault{mode: busy}, 1500*time.Millisecond)},
		{"busy-items", "the backend refuses every third record for now", faulty(fault{mode: busyItem}, 1500*time.Millisecond)},
		{"too-large", "the backend refuses large requests with 413", faulty(fault{mode: tooLarge, limit: 20_000}, 1500*time.Millisecond)},
		{"rejects", "the backend refuses every tenth record for good", faulty(fault{mode: reject}, time.Second)},
		{"slow", "the backend takes 700 ms for an answer", faulty(fault{mode: slow, delay: 700 * time.Millisecond}, 2*time.Second)},
		{"half-open", "the backend accepts and never answers", faulty(fault{mode: stall}, 4*time.Second)},
		{"swallow", "the backend stores and hangs up instead of answering", faulty(fault{mode: swallow}, 800*time.Millisecond)},
		{"restarts", "the backend goes away and comes again, five times", restarts},
		{"clock-step", "the runtime's clock jumps an hour back and a day ahead", clockStep},
		{"partials", "lines of both streams in parts that take turns, across rotation and SIGKILL", partials},
		{"long-lines", "lines of 1 MB and 100 MB (quick: 24 MB), whole and in parts", longLines},
		{"idle-files", "5,000 idle files beside a busy one", idleFiles},
		{"malformed", "no CRI line, NULs, invalid UTF-8, empty lines", malformed},
		{"symlink", "a log that is a symlink out of the folder, and one that leads nowhere", symlink},
		{"checkpoint-cut", "the checkpoint is cut in half while the collector is down", checkpointCut},
		{"million-fields", "a JSON line with a million fields", millionFields},
	}
}

// lines is how many lines a step of a scenario has.
func (w *world) lines(quick int) int {
	if w.full {
		return quick * 10
	}
	return quick
}

func steady(ctx context.Context, w *world) error {
	cs, err := w.containers(6)
	if err != nil {
		return err
	}
	return w.during(cs, 2000, func() error { return pause(ctx, 2*time.Second) })
}

func rotateStopped(silence time.Duration, times int) func(context.Context, *world) error {
	return func(ctx context.Context, w *world) error {
		cs, err := w.containers(3)
		if err != nil {
			return err
		}
		if err := w.write(cs, w.lines(500)); err != nil {
			return err
		}
		if err := w.arrivedAll(ctx); err != nil {
			return err
		}
		if err := pause(ctx, silence); err != nil {
			return err
		}
		w.collector.pause()
		defer w.collector.resume()
		for range times {
			if err := w.write(cs, w.lines(300)); err != nil {
				return err
			}
			if err := rotateAll(cs); err != nil {
				return err
			}
		}
		return w.write(cs, w.lines(300))
	}
}

func rotateAll(cs []*container) error {
	for _, c := range cs {
		if err := c.rotate(); err != nil {
			return err
		}
	}
	return nil
}

func rotateDown(times int) func(context.Context, *world) error {
	return func(ctx context.Context, w *world) error {
		cs, err := w.containers(3)
		if err != nil {
			return err
		}
		if err := w.write(cs, w.lines(500)); err != nil {
			return err
		}
		w.backend.down()
		for range times {
			if err := w.write(cs, w.lines(300)); err != nil {
				return err
			}
			if err := pause(ctx, 600*time.Millisecond); err != nil { // so that the collector has seen it
				return err
			}
			if err := rotateAll(cs); err != nil {
				return err
			}
		}
		if err := w.write(cs, w.lines(300)); err != nil {
			return err
		}
		return w.backend.up()
	}
}

func gz(ctx context.Context, w *world) error {
	cs, err := w.containers(3)
	if err != nil {
		return err
	}
	if err := w.write(cs, w.lines(500)); err != nil {
		return err
	}
	if err := w.arrivedAll(ctx); err != nil {
		return err
	}
	w.collector.kill()
	for range 3 {
		if err := w.write(cs, w.lines(300)); err != nil {
			return err
		}
		if err := rotateAll(cs); err != nil {
			return err
		}
	}
	return errors.Join(w.write(cs, w.lines(300)), w.collector.start())
}

func rotateFast(ctx context.Context, w *world) error {
	cs, err := w.containers(2)
	if err != nil {
		return err
	}
	return w.during(cs, 3000, func() error {
		for range w.lines(8) {
			if err := pause(ctx, 250*time.Millisecond); err != nil {
				return err
			}
			if err := rotateAll(cs); err != nil {
				return err
			}
		}
		return nil
	})
}

func copytruncate(ctx context.Context, w *world) error {
	cs, err := w.containers(3)
	if err != nil {
		return err
	}
	truncate := func() error {
		for _, c := range cs {
			if err := c.copyTruncate(); err != nil {
				return err
			}
		}
		return nil
	}
	for _, n := range []int{600, 100, 400} { // shorter and longer than what was there
		if err := w.write(cs, w.lines(n)); err != nil {
			return err
		}
		if err := w.arrivedAll(ctx); err != nil {
			return err
		}
		if err := truncate(); err != nil {
			return err
		}
	}
	if err := w.write(cs, w.lines(200)); err != nil {
		return err
	}
	// And unread: nobody can have these lines, but they can be counted.
	w.backend.down()
	if err := w.write(cs, w.lines(300)); err != nil {
		return err
	}
	if err := pause(ctx, 1500*time.Millisecond); err != nil {
		return err
	}
	if err := truncate(); err != nil {
		return err
	}
	return errors.Join(w.write(cs, w.lines(200)), w.backend.up())
}

func inode(path string) (uint64, error) {
	info, err := os.Stat(path)
	if err != nil {
		return 0, err
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, errors.New("no inode")
	}
	return stat.Ino, nil
}

func inodeReuse(ctx context.Context, w *world) error {
	c, err := w.container("shop")
	if err != nil {
		return err
	}
	cs := []*container{c}
	if err := w.write(cs, w.lines(300)); err != nil {
		return err
	}
	if err := w.arrivedAll(ctx); err != nil {
		return err
	}
	old, err := inode(c.path)
	if err != nil {
		return err
	}
	w.collector.kill()
	if err := c.remove(); err != nil {
		return err
	}
	for range 300 {
		next, err := w.container("shop")
		if err != nil {
			return err
		}
		now, err := inode(next.path)
		if err != nil {
			return err
		}
		if now == old {
			return errors.Join(w.write([]*container{next}, w.lines(500)), w.collector.start())
		}
		if err := next.remove(); err != nil {
			return err
		}
	}
	return errors.Join(skipped{"this file system gave the inode to nobody"}, w.collector.start())
}

func podDeleted(ctx context.Context, w *world) error {
	cs, err := w.containers(4)
	if err != nil {
		return err
	}
	if err := w.write(cs, w.lines(300)); err != nil {
		return err
	}
	w.backend.down()
	if err := w.write(cs, w.lines(300)); err != nil {
		return err
	}
	if err := pause(ctx, 1500*time.Millisecond); err != nil {
		return err
	}
	for _, c := range cs[:2] {
		if err := c.remove(); err != nil {
			return err
		}
	}
	return errors.Join(w.write(cs[2:], w.lines(200)), w.backend.up())
}

func shortPods(ctx context.Context, w *world) error {
	others, err := w.containers(2)
	if err != nil {
		return err
	}
	return w.during(others, 500, func() error {
		for range w.lines(15) {
			c, err := w.container("jobs")
			if err != nil {
				return err
			}
			if err := w.write([]*container{c}, 20); err != nil {
				return err
			}
			if err := pause(ctx, 200*time.Millisecond); err != nil {
				return err
			}
			if err := c.remove(); err != nil {
				return err
			}
		}
		return nil
	})
}

func sigkill(ctx context.Context, w *world) error {
	cs, err := w.containers(4)
	if err != nil {
		return err
	}
	kills := 15
	if w.full {
		kills = 100
	}
	return w.during(cs, 1000, func() error {
		for i := range kills {
			if err := pause(ctx, time.Duration(30+w.seed(400))*time.Millisecond); err != nil {
				return err
			}
			w.collector.kill()
			if i%5 == 4 { // one container's file in turn, so that kubelet need not delete
				if err := cs[i/5%len(cs)].rotate(); err != nil {
					return err
				}
			}
			if err := w.collector.start(); err != nil {
				return err
			}
		}
		return nil
	})
}

// seed is a random number below n that is not the writer's.
func (w *world) seed(n int) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.other.IntN(n)
}

func enospc(ctx context.Context, w *world) error {
	w.collector.kill()
	mounted := false
	if err := syscall.Mount("torture", w.data, "tmpfs", 0, "size=256k,mode=0700"); err == nil {
		mounted = true
		w.cleanup = append(w.cleanup, func() error { return syscall.Unmount(w.data, syscall.MNT_DETACH) })
	} else {
		w.collector.limit = 1 // KiB: what is longer cannot be written
	}
	if err := w.collector.start(); err != nil {
		return err
	}
	cs, err := w.containers(8)
	if err != nil {
		return err
	}
	if err := w.write(cs, w.lines(300)); err != nil {
		return err
	}
	junk := filepath.Join(w.data, "junk")
	if mounted {
		if err := pause(ctx, 500*time.Millisecond); err != nil {
			return err
		}
		err := os.WriteFile(junk, make([]byte, 1<<20), 0o600)
		if !errors.Is(err, syscall.ENOSPC) {
			return fmt.Errorf("the small file system took 1 MiB: %w", err)
		}
	}
	return errors.Join(w.during(cs, 1000, func() error {
		if err := pause(ctx, time.Second); err != nil {
			return err
		}
		w.collector.kill() // with a checkpoint that is old
		if err := w.collector.start(); err != nil {
			return err
		}
		if err := pause(ctx, time.Second); err != nil {
			return err
		}
		if mounted {
			return os.Remove(junk)
		}
		w.collector.kill()
		w.collector.limit = 0
		return w.collector.start()
	}))
}

func faulty(f fault, d time.Duration) func(context.Context, *world) error {
	return func(ctx context.Context, w *world) error {
		cs, err := w.containers(4)
		if err != nil {
			return err
		}
		if err := w.write(cs, w.lines(200)); err != nil {
			return err
		}
		return w.during(cs, 1000, func() error {
			w.backend.set(f)
			if err := pause(ctx, d); err != nil {
				return err
			}
			w.backend.set(fault{})
			return pause(ctx, 200*time.Millisecond)
		})
	}
}

func restarts(ctx context.Context, w *world) error {
	cs, err := w.containers(4)
	if err != nil {
		return err
	}
	return w.during(cs, 1000, func() error {
		for range 5 {
			if err := pause(ctx, time.Duration(50+w.seed(300))*time.Millisecond); err != nil {
				return err
			}
			w.backend.down()
			if err := pause(ctx, time.Duration(50+w.seed(400))*time.Millisecond); err != nil {
				return err
			}
			if err := w.backend.up(); err != nil {
				return err
			}
		}
		return nil
	})
}

// clockStep moves the runtime's clock alone: the machine's belongs to others.
func clockStep(ctx context.Context, w *world) error {
	cs, err := w.containers(3)
	if err != nil {
		return err
	}
	for _, step := range []time.Duration{0, -time.Hour, 24 * time.Hour, 0} {
		for _, c := range cs {
			c.step(step)
		}
		if err := w.write(cs, w.lines(300)); err != nil {
			return err
		}
		if err := rotateAll(cs[:1]); err != nil {
			return err
		}
		if err := pause(ctx, 300*time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}

func partials(ctx context.Context, w *world) error {
	cs, err := w.containers(3)
	if err != nil {
		return err
	}
	for i := range w.lines(120) {
		c := cs[i%len(cs)]
		at := 0
		var between func(int) error
		switch i % 20 {
		case 9: // killed with half a line read, or not
			killAt := 1 + w.rand.IntN(4)
			between = func(part int) error {
				if part != killAt {
					return nil
				}
				if err := pause(ctx, time.Duration(w.seed(300))*time.Millisecond); err != nil {
					return err
				}
				w.collector.kill()
				return w.collector.start()
			}
			fallthrough
		case 19:
			at = 1 + w.rand.IntN(4)
		default:
		}
		if err := c.interleaved(100+w.rand.IntN(3000), 5, at, between); err != nil {
			return err
		}
		if at > 0 {
			if err := pause(ctx, 300*time.Millisecond); err != nil {
				return err
			}
		}
	}
	return nil
}

func longLines(_ context.Context, w *world) error {
	cs, err := w.containers(2)
	if err != nil {
		return err
	}
	huge := 24_000_000
	if w.full {
		huge = 100_000_000
	}
	var errs []error
	for _, l := range []struct{ bytes, parts int }{{1_000_000, 1}, {1_000_000, 62}, {1_300_000, 1}, {1_300_000, 80}, {huge, 1}, {huge, huge / 16_000}} {
		errs = append(errs, w.write(cs, 50), cs[0].line("stdout", l.bytes, l.parts, long), w.write(cs, 50))
	}
	return errors.Join(errs...)
}

func idleFiles(ctx context.Context, w *world) error {
	cs, err := w.containers(5000)
	if err != nil {
		return err
	}
	for _, c := range cs {
		if err := c.line("stdout", 100, 1, plain); err != nil {
			return err
		}
	}
	return w.during(cs[:1], 1000, func() error { return pause(ctx, 2*time.Second) })
}

func malformed(_ context.Context, w *world) error {
	cs, err := w.containers(2)
	if err != nil {
		return err
	}
	c := cs[0]
	join := func(parts ...string) func([]byte) []byte {
		return func(head []byte) []byte {
			return []byte(strings.ReplaceAll(strings.Join(parts, ""), "HEAD", string(head)))
		}
	}
	const stamp = "2026-01-02T03:04:05.678901234Z"
	for _, text := range []string{
		"HEAD no runtime at all\n",
		"stdout F HEAD\n",
		stamp + " HEAD\n",
		stamp + " stdout HEAD\n",
		stamp + " stdout X HEAD\n",
		stamp + " stdin F HEAD\n",
		"not-a-time stdout F HEAD\n",
		"9999-99-99T99:99:99Z stdout F HEAD\n",
		stamp + "  stdout  F  HEAD\n",
		stamp + " stdout F \x00\x00HEAD\x00\n",
		stamp + " stdout F \xff\xfe\xc3HEAD\xf0\x28\x8c\n",
		"\x00\x00\x00HEAD\n",
		"\xff\xfe" + stamp + " stdout F HEAD\n",
		stamp + " stdout F HEAD\r\n",
		stamp + " stdout F:extra:P HEAD\n",
		"\n\n \n" + stamp + " stdout F HEAD\n",
		`{"log":"HEAD\n","stream":"stdout","time":"` + stamp + "\"}\n",
		stamp + " stdout F {\"a\":[{\"HEAD\":\n",
	} {
		if err := errors.Join(w.write(cs, 20), c.raw("stdout", join(text)), w.write(cs, 20)); err != nil {
			return err
		}
	}
	return nil
}

func symlink(ctx context.Context, w *world) error {
	cs, err := w.containers(2)
	if err != nil {
		return err
	}
	// What lies outside has numbered lines too, which are counted apart.
	outside := filepath.Join(filepath.Dir(w.logs), "outside")
	secret, err := w.containerAt("secret", "outside", outside)
	if err != nil {
		return err
	}
	if err := w.write([]*container{secret}, 50); err != nil {
		return err
	}
	for _, s := range secret.streams {
		for i := range s.lines {
			s.lines[i].secret = true
		}
	}
	for i, target := range []string{secret.path, "/nowhere/at/all", "0.log", "/dev/zero", outside} {
		folder := filepath.Join(w.logs, fmt.Sprintf("shop_link-%d_00000000-0000-4000-8000-0000000000%02d", i, i), "app")
		if err := os.MkdirAll(folder, 0o755); err != nil { //nolint:gosec // kubelet's mode
			return err
		}
		if err := os.Symlink(target, filepath.Join(folder, "0.log")); err != nil {
			return err
		}
	}
	if err := os.Symlink(outside, filepath.Join(w.logs, "shop_link-9_00000000-0000-4000-8000-000000000099")); err != nil {
		return err
	}
	return w.during(cs, 500, func() error { return pause(ctx, 2*time.Second) })
}

func checkpointCut(ctx context.Context, w *world) error {
	cs, err := w.containers(4)
	if err != nil {
		return err
	}
	for round := range 3 {
		if err := w.write(cs, w.lines(300)); err != nil {
			return err
		}
		if err := pause(ctx, 1200*time.Millisecond); err != nil {
			return err
		}
		w.collector.kill()
		err := filepath.WalkDir(w.data, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			info, err := d.Info()
			if err != nil {
				return err
			}
			if strings.Contains(path, "spool") || d.Name() == "lock" { // log files of kubelet's, and no file of state
				return nil
			}
			return os.Truncate(path, info.Size()*int64(round)/4)
		})
		if err := errors.Join(err, w.write(cs, w.lines(100)), w.collector.start()); err != nil {
			return err
		}
	}
	return nil
}

func millionFields(_ context.Context, w *world) error {
	cs, err := w.containers(2)
	if err != nil {
		return err
	}
	n := 100_000
	if w.full {
		n = 1_000_000
	}
	for _, fields := range []int{300, 5000, n} {
		var b strings.Builder
		for i := range fields {
			fmt.Fprintf(&b, `,"field_%d":%d`, i, i)
		}
		err := errors.Join(w.write(cs, 50), cs[0].raw("stdout", func(head []byte) []byte {
			return fmt.Appendf(nil, "%s stdout F {\"message\":%q%s}\n", time.Now().UTC().Format(cri), head, b.String())
		}), w.write(cs, 50))
		if err != nil {
			return err
		}
	}
	return nil
}
