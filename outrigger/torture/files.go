package torture

import (
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// generation is one file that lines were written into, whatever it is called
// now.
type generation struct {
	deleted time.Time // zero while it is there
}

// written is a line that was written, as the kit remembers it.
type written struct {
	at         int64 // nanoseconds since 1970
	bytes      int64 // in the file, with what the runtime adds
	generation *generation
	secret     bool // outside the folder of the logs
}

// source is a stream of a container: numbered lines in their order.
type source struct {
	id    uint32
	name  string // for people: namespace/pod/container/stream
	lines []written
}

// container writes lines as a runtime does and treats their files as kubelet
// does. It is safe for concurrent use.
type container struct {
	mu      sync.Mutex
	folder  string
	path    string
	file    *os.File
	current *generation
	older   map[string]*generation // by the name of the file without .gz
	streams map[string]*source
	stamp   time.Time // of the last rotation
	maximum int       // files, as kubelet's containerLogMaxFiles
	clock   func() time.Time
	removed bool
}

// defaultFiles is kubelet's containerLogMaxFiles.
const defaultFiles = 5

const (
	stampLayout = "20060102-150405"
	cri         = "2006-01-02T15:04:05.000000000Z07:00"
)

// open makes the folder and the file <folder>/0.log, as a runtime does when the
// container starts.
func openContainer(folder string, clock func() time.Time) (*container, error) {
	if err := os.MkdirAll(folder, 0o755); err != nil { //nolint:gosec // kubelet's mode
		return nil, err
	}
	c := &container{folder: folder, path: filepath.Join(folder, "0.log"), older: map[string]*generation{}, maximum: defaultFiles, clock: clock}
	return c, c.reopen()
}

func (c *container) reopen() (err error) {
	if c.file != nil {
		if err := c.file.Close(); err != nil {
			return err
		}
	}
	c.file, err = os.OpenFile(c.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640) //nolint:gosec // kubelet's mode
	c.current = &generation{}
	return err
}

// part is one CRI line.
type part struct {
	stream string
	text   []byte
	last   bool // F, not P
}

func (c *container) encode(p part) []byte {
	tag := " P "
	if p.last {
		tag = " F "
	}
	b := c.clock().UTC().AppendFormat(make([]byte, 0, len(p.text)+48), cri)
	b = append(b, ' ')
	b = append(b, p.stream...)
	b = append(b, tag...)
	b = append(b, p.text...)
	return append(b, '\n')
}

// next counts a line of the stream. The caller holds the lock and adds what is
// written of it.
func (c *container) next(s *source, filling int, k kind) (head, *written) {
	now := time.Now().UnixNano()
	s.lines = append(s.lines, written{at: now, generation: c.current})
	return head{source: s.id, number: uint32(len(s.lines) - 1), written: now, filling: filling, kind: k}, &s.lines[len(s.lines)-1]
}

var errRemoved = errors.New("the container was removed")

// write appends the bytes as they are and counts them for the line.
func (c *container) write(w *written, b []byte) error {
	n, err := c.file.Write(b)
	w.bytes += int64(n)
	return err
}

// line writes a whole line in the given number of parts, one write a part.
func (c *container) line(stream string, filling, parts int, k kind) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.removed {
		return errRemoved
	}
	h, w := c.next(c.streams[stream], filling, k)
	for _, p := range split(stream, h.line(), parts) {
		if err := c.write(w, c.encode(p)); err != nil {
			return err
		}
	}
	return nil
}

// raw writes a line that wrap made of the head, without a runtime's prefix.
func (c *container) raw(stream string, wrap func(head []byte) []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	h, w := c.next(c.streams[stream], 0, embedded)
	return c.write(w, wrap(h.appendTo(nil)))
}

// interleaved writes a line of each stream in parts that take turns. Before the
// part with the number rotateAt the file is rotated; 0 is never. Between any two
// parts between is called, if there is one.
func (c *container) interleaved(filling, parts, rotateAt int, between func(part int) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	ho, _ := c.next(c.streams["stdout"], filling, plain)
	he, _ := c.next(c.streams["stderr"], filling+3, plain)
	out, errs := split("stdout", ho.line(), parts), split("stderr", he.line(), parts)
	for i := range out {
		if rotateAt > 0 && i == rotateAt {
			if err := c.rotateLocked(); err != nil {
				return err
			}
		}
		if i > 0 && between != nil {
			if err := between(i); err != nil {
				return err
			}
		}
		if err := c.write(&c.streams["stdout"].lines[ho.number], c.encode(out[i])); err != nil {
			return err
		}
		if err := c.write(&c.streams["stderr"].lines[he.number], c.encode(errs[i])); err != nil {
			return err
		}
	}
	return nil
}

// torn writes a line in two writes, so that a reader may see half of it.
func (c *container) torn(stream string, filling int, between func()) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	h, w := c.next(c.streams[stream], filling, plain)
	b := c.encode(part{stream, h.line(), true})
	if err := c.write(w, b[:len(b)/2]); err != nil {
		return err
	}
	between()
	return c.write(w, b[len(b)/2:])
}

func split(stream string, text []byte, parts int) []part {
	parts = max(parts, 1)
	each := (len(text) + parts - 1) / parts
	var out []part
	for chunk := range slices.Chunk(text, max(each, 1)) {
		out = append(out, part{stream, chunk, false})
	}
	for len(out) < parts { // a part may be empty
		out = append(out, part{stream, nil, false})
	}
	out[len(out)-1].last = true
	return out
}

// rotate is one pass of kubelet's container log manager over the file: clean up,
// make room, compress, rename, reopen.
func (c *container) rotate() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.rotateLocked()
}

func (c *container) rotateLocked() error {
	rotated, err := c.rotated()
	if err != nil {
		return err
	}
	for len(rotated) > c.maximum-2 {
		if err := os.Remove(rotated[0]); err != nil {
			return err
		}
		c.gone(rotated[0])
		rotated = rotated[1:]
	}
	for _, path := range rotated {
		if !strings.HasSuffix(path, ".gz") {
			if err := compress(path); err != nil {
				return err
			}
		}
	}
	now := time.Now().UTC().Truncate(time.Second)
	if !now.After(c.stamp) { // kubelet's passes are more than a second apart
		now = c.stamp.Add(time.Second)
	}
	c.stamp = now
	name := c.path + "." + now.Format(stampLayout)
	if err := os.Rename(c.path, name); err != nil {
		return err
	}
	c.older[name] = c.current
	return c.reopen()
}

// rotated lists the rotated files, oldest first, and deletes what an interrupted
// compression left.
func (c *container) rotated() ([]string, error) {
	all, err := filepath.Glob(c.path + ".*")
	if err != nil {
		return nil, err
	}
	var out []string
	for _, path := range all {
		if strings.HasSuffix(path, ".tmp") {
			if err := os.Remove(path); err != nil {
				return nil, err
			}
			continue
		}
		out = append(out, path)
	}
	slices.Sort(out)
	return out, nil
}

func (c *container) gone(path string) {
	path = strings.TrimSuffix(path, ".gz")
	if g := c.older[path]; g != nil {
		g.deleted = time.Now()
		delete(c.older, path)
	}
}

// compress writes the file anew through <path>.tmp, so that the compressed one
// has an inode of its own.
func compress(path string) (err error) {
	in, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }() // it was read only
	tmp := path + ".tmp"
	out, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644) //nolint:gosec // kubelet's mode
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, out.Close())
		if err == nil {
			err = os.Rename(tmp, path+".gz")
		}
		if err == nil {
			err = os.Remove(path)
		}
	}()
	z := gzip.NewWriter(out)
	if _, err := io.Copy(z, in); err != nil {
		return err
	}
	return z.Close()
}

// copyTruncate empties the file in place, as logrotate does. The copy goes where
// no collector looks.
func (c *container) copyTruncate() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.file.Truncate(0); err != nil {
		return err
	}
	c.current.deleted = time.Now()
	c.current = &generation{}
	return nil
}

// remove deletes <log>* and the folders, as kubelet does with the container.
func (c *container) remove() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.removed {
		return nil
	}
	c.removed = true
	errs := []error{c.file.Close()}
	all, err := filepath.Glob(c.path + "*")
	errs = append(errs, err)
	for _, path := range all {
		errs = append(errs, os.Remove(path))
		c.gone(path)
	}
	c.current.deleted = time.Now()
	errs = append(errs, os.Remove(c.folder))
	_ = os.Remove(filepath.Dir(c.folder)) // other containers of the pod may be there
	return errors.Join(errs...)
}

// step moves the clock of the runtime away from the real one.
func (c *container) step(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.clock = func() time.Time { return time.Now().Add(d) }
}

func (c *container) String() string { return fmt.Sprintf("container at %s", c.path) }
