package torture

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"
)

func itoa(n int) string { return strconv.Itoa(n) }

func quiet() *log.Logger { return log.New(io.Discard, "", 0) }

// world is one scenario at one output: the folders, the backend, the collector,
// and everything that was written.
type world struct {
	full      bool
	logs      string // as /var/log/pods
	data      string
	rand      *rand.Rand
	backend   backend
	collector *collector
	judge     *judge
	clock     func() time.Time // of the runtime
	late      func(context.Context) (int, error)

	other   *rand.Rand // of what is broken, so that the writer's choices stay the same
	cleanup []func() error

	mu      sync.Mutex
	sources []*source
	pods    int
}

// container makes a container of a new pod, as the runtime and kubelet do.
func (w *world) container(namespace string) (*container, error) {
	w.mu.Lock()
	w.pods++
	n := w.pods
	w.mu.Unlock()
	pod := "pod-" + itoa(n)
	uid := fmt.Sprintf("%08x-0000-4000-8000-%012x", n, n)
	return w.containerAt(namespace, pod, filepath.Join(w.logs, namespace+"_"+pod+"_"+uid, "app"))
}

func (w *world) containerAt(namespace, pod, folder string) (*container, error) {
	c, err := openContainer(folder, w.clock)
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	c.streams = map[string]*source{}
	for _, stream := range []string{"stdout", "stderr"} {
		s := &source{id: uint32(len(w.sources) + 1), name: namespace + "/" + pod + "/app/" + stream}
		w.sources = append(w.sources, s)
		c.streams[stream] = s
	}
	return c, nil
}

// containers makes several.
func (w *world) containers(n int) ([]*container, error) {
	var out []*container
	for i := range n {
		c, err := w.container([]string{"shop", "payments", "kube-system"}[i%3])
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}

// write writes n ordinary lines, spread over the containers: both streams, in
// parts now and then, torn now and then.
func (w *world) write(cs []*container, n int) error {
	for range n {
		c := cs[w.rand.IntN(len(cs))]
		stream := "stdout"
		if w.rand.IntN(4) == 0 {
			stream = "stderr"
		}
		var err error
		switch filling := 40 + w.rand.IntN(200); w.rand.IntN(40) {
		case 0:
			err = c.line(stream, filling, 2+w.rand.IntN(4), plain)
		case 1:
			err = c.interleaved(filling, 3, 0, nil)
		case 2:
			err = c.torn(stream, filling, func() { time.Sleep(time.Millisecond) })
		default:
			err = c.line(stream, filling, 1, plain)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// during writes lines at about the rate, in lines a second, while f runs.
func (w *world) during(cs []*container, rate int, f func() error) error {
	done := make(chan struct{})
	var writing error
	var group sync.WaitGroup
	group.Go(func() {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
				if writing = w.write(cs, max(rate/50, 1)); writing != nil {
					return
				}
			}
		}
	})
	err := f()
	close(done)
	group.Wait()
	return errors.Join(err, writing)
}

// total is how many lines were written that have to arrive.
func (w *world) total() (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range w.sources {
		for _, l := range s.lines {
			if !l.secret {
				n++
			}
		}
	}
	return n
}

// arrivedAll waits until everything that was written has arrived; an error says
// that it did not.
func (w *world) arrivedAll(ctx context.Context) error {
	const within = 20 * time.Second
	want := w.total()
	for deadline := time.Now().Add(within); ; {
		n, err := w.count(ctx)
		if err != nil {
			return err
		}
		if n >= want {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d of %d lines arrived within %s", n, want, within)
		}
		if err := pause(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
}

func (w *world) count(ctx context.Context) (int, error) {
	if w.late != nil {
		return w.late(ctx)
	}
	return w.judge.count(), nil
}

// settle waits until nothing more is to be expected: everything arrived, or the
// collector says that nothing is pending, or nothing has moved for long.
func (w *world) settle(ctx context.Context, patience time.Duration) error {
	want := w.total()
	before, moved := -1, time.Now()
	for {
		n, err := w.count(ctx)
		if err != nil && ctx.Err() != nil {
			return err
		}
		if n != before {
			before, moved = n, time.Now()
		}
		if n >= want {
			return pause(ctx, 300*time.Millisecond) // for what comes twice
		}
		still := time.Since(moved)
		if still > patience {
			return nil
		}
		if still > 2500*time.Millisecond {
			if a, err := w.collector.audit(ctx); err == nil && a.Pending == 0 && a.Written > 0 {
				return nil
			}
		}
		if err := w.collector.ensure(); err != nil {
			return err
		}
		if err := pause(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
}

// pause waits, unless the context ends.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// removeAll empties a folder that may hold mounts no longer there.
func removeAll(dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove what an earlier run left: %w", err)
	}
	return nil
}
