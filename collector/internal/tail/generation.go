package tail

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/internal/cri"
	"github.com/outrigger-mesh/outrigger/collector/internal/ledger"
)

// generation is one file between its creation and its deletion, whatever its
// name is meanwhile.
type generation struct {
	path     string
	dev, ino uint64
	file     *os.File // nil while closed
	link     string   // its name in the spool, without the folder; empty without one
	// gz: the file is compressed, and offsets are those of what it holds.
	gz *inflater
	// gzPath is where kubelet has put the compressed copy of it. The account stays
	// open as long as that is there, or the next process would read it again.
	gzPath string

	// id is empty until the first line is whole; nothing is read before.
	id string
	// origin names the generation in the ids of records. The compressed copy of a
	// file has the same, so that a backend knows a record again that it took before a crash.
	origin string
	first  int32 // bytes that were hashed for it
	times  int32 // see before
	hash   hash

	offset int64 // next byte to read
	size   int64 // by the last stat
	done   []ledger.Span
	long   *long // nil but within a physical line longer than a chunk

	modified     stamp // by the last stat
	quietSince   stamp // read to the end, and the size unchanged, since
	missingSince stamp
	gone         bool // deleted: what the open file or the link has is all there is
	replaced     bool // overwritten in place: the file is another generation now
	restored     bool // found in the spool, and not yet seen elsewhere
	named        bool // found in the last listing of its folder
	fresh        bool // found in this sweep, and not yet in its place
	finished     bool // superseded and read to its end
	again        bool // finished, and then seen to have grown

	after succession
	begun bool // its turn has come: what was open before it is settled

	// before is the generation that this one overwrote in place. If both begin
	// with the same line, times tells them apart.
	before *generation
}

// hash of the first line.
type hash [16]byte

func hashOf(b []byte) hash {
	sum := sha256.Sum256(b)
	return hash(sum[:len(hash{})])
}

// long is a physical line longer than a chunk, as far as it was read.
type long struct {
	text  []byte
	cut   int
	start int64
}

// stamp is a time in nanoseconds since 1970, 0 for none. There are many of them, and a time.Time is
// three times as long.
type stamp int64

func stampOf(t time.Time) stamp { return stamp(t.UnixNano()) }

func (s stamp) until(now stamp) time.Duration { return time.Duration(now - s) }

func (s stamp) time() time.Time { return time.Unix(0, int64(s)) }

// succession says whether a generation follows the one before it in the list, so that a
// record may go on from there. If it does not, another one lay between them that was rotated
// and deleted before it could be seen.
type succession uint8

const (
	unknown succession = iota
	adjacent
	apart
)

// errOther says that the path has another file by now.
var errOther = errors.New("another file took the name")

func numbers(info fs.FileInfo) (dev, ino uint64, err error) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, 0, fmt.Errorf("%s: the file system gives no inode numbers", info.Name())
	}
	return uint64(st.Dev), st.Ino, nil //nolint:unconvert // Dev is an int32 on some systems
}

// open opens the file unless it is open, and makes sure it is the same one.
func (f *Follower) open(l *containerLog, g *generation) error {
	if g.file != nil {
		return nil
	}
	path := g.path
	if g.link != "" && g.gz == nil {
		path = f.linkPath(l, g.link) // which nobody else renames
	}
	// Without O_NONBLOCK a pipe would keep us until somebody writes to it.
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	info, err := file.Stat()
	if err == nil {
		var dev, ino uint64
		dev, ino, err = numbers(info)
		if err == nil && (dev != g.dev || ino != g.ino) {
			err = errOther
		}
		if err == nil && !info.Mode().IsRegular() {
			err = fmt.Errorf("%s is not a regular file", g.path)
		}
	}
	if err != nil {
		return errors.Join(err, file.Close())
	}
	g.file = file
	if strings.HasSuffix(g.path, ".gz") {
		g.gz = &inflater{file: file}
	}
	return nil
}

func (g *generation) close() error {
	if g.file == nil {
		return nil
	}
	err := g.file.Close()
	g.file = nil
	if g.gz != nil {
		g.gz = &inflater{}
	}
	return err
}

// unlinked reports whether the file has no name left but that in the spool.
func (g *generation) unlinked() bool {
	if g.file == nil {
		return false
	}
	info, err := g.file.Stat()
	if err != nil {
		return false
	}
	return names(info) == g.links()
}

// links is how many of the file's names are our own.
func (g *generation) links() uint64 {
	if g.link == "" {
		return 0
	}
	return 1
}

func names(info fs.FileInfo) uint64 {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 1 << 16
	}
	return uint64(st.Nlink) //nolint:unconvert // narrower on some systems
}

// unread is where the bytes begin that no complete line has been made of.
func (g *generation) unread() int64 {
	if g.long != nil {
		return g.long.start
	}
	return g.offset
}

// readAt is io.ReaderAt for plain and for compressed files.
func (g *generation) readAt(b []byte, offset int64) (int, error) {
	if g.gz != nil {
		return g.gz.readAt(b, offset)
	}
	return g.file.ReadAt(b, offset)
}

// head reads the first bytes of the file into b.
func (g *generation) head(b []byte) ([]byte, error) {
	m, err := g.readAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return b[:m], nil
}

// same reports whether the file still begins with the line that it had.
func (f *Follower) same(g *generation) (bool, error) {
	b, err := g.head(f.headBuf[:g.first])
	if err != nil {
		return false, err
	}
	return len(b) == int(g.first) && hashOf(b) == g.hash, nil
}

// identify gives the generation its id and its place, once the first line is
// whole or so long that its beginning will do. A final one takes what there is.
func (f *Follower) identify(l *containerLog, g *generation, final bool) error {
	if g.id != "" {
		return nil
	}
	b, err := g.head(f.headBuf[:])
	if err != nil {
		return err
	}
	switch i := bytes.IndexByte(b, '\n'); {
	case i >= 0:
		b = b[:i+1]
	case len(b) == firstLine || final && len(b) > 0:
	default:
		return nil
	}
	g.first, g.hash = int32(len(b)), hashOf(b)
	g.id = fmt.Sprintf("%s%x", identity(g.dev, g.ino), g.hash[:8])
	if g.before != nil && g.before.hash == g.hash {
		g.times = g.before.times + 1
		g.id = fmt.Sprintf("%s-%d", g.id, g.times)
	}
	g.origin = g.id
	if l.stamped(b) {
		where := sha256.Sum256([]byte(filepath.Base(filepath.Dir(filepath.Dir(l.path))) + "/" + filepath.Base(filepath.Dir(l.path))))
		g.origin = fmt.Sprintf("%x-%x", where[:6], g.hash[:8])
		if g.times > 0 {
			g.origin = fmt.Sprintf("%s-%d", g.origin, g.times)
		}
	}
	g.before = nil
	if g.gz != nil {
		// The copy has another inode than what it was made of. Its first line finds the account.
		if id, ok := f.known(l, g); ok {
			g.id = id
		}
	}
	at := f.book.Open(g.id, g.path, l.owner())
	g.offset, g.done = at.Offset, at.Above
	// It may have been taken for deleted, and read to its end, and be back.
	f.leaving = slices.DeleteFunc(f.leaving, func(x leaving) bool {
		if x.id == g.id && g.link == "" {
			g.link = filepath.Base(x.link)
		}
		return x.id == g.id
	})
	f.keep(l, g)
	return nil
}

// stamped reports whether the line has a time of nanoseconds, which makes it unique among
// the lines of its container.
func (l *containerLog) stamped(line []byte) bool {
	if l.input != nil {
		return false
	}
	line = bytes.TrimSuffix(line, []byte{'\n'})
	_, problem := cri.Parse(line)
	return problem == cri.OK || cri.IsDocker(line)
}

// identity is how the ids of all generations with these numbers begin.
func identity(dev, ino uint64) string { return fmt.Sprintf("%x-%x-", dev, ino) }

// known returns the account of the file of which g is the compressed copy.
func (f *Follower) known(l *containerLog, g *generation) (id string, ok bool) {
	hash := fmt.Sprintf("%x", g.hash[:8])
	folder := filepath.Dir(l.path)
	return f.book.Find(func(file, path string) bool {
		parts := strings.Split(file, "-")
		return len(parts) > 2 && parts[2] == hash && filepath.Dir(path) == folder
	})
}

// covered reports whether the physical line [start, end) was settled before a
// restart. Lines are asked for in order.
func (g *generation) covered(start, end int64) bool {
	for len(g.done) > 0 && g.done[0].End <= start {
		g.done = g.done[1:]
	}
	return len(g.done) > 0 && g.done[0].Start <= start && end <= g.done[0].End
}

// inflater reads a compressed file forwards, and keeps what it read last, because the
// reader comes back for the beginning of a line.
type inflater struct {
	file *os.File
	z    *gzip.Reader
	last []byte // what lies before next
	next int64  // offset behind what was inflated
	end  bool
}

func (z *inflater) readAt(b []byte, offset int64) (int, error) {
	begin := z.next - int64(len(z.last))
	if z.z == nil || offset < begin {
		if _, err := z.file.Seek(0, io.SeekStart); err != nil {
			return 0, err
		}
		r, err := gzip.NewReader(z.file)
		if err != nil {
			return 0, err
		}
		*z = inflater{file: z.file, z: r}
		begin = 0
	}
	n := 0
	if offset < z.next {
		n = copy(b, z.last[offset-begin:])
	} else if skip := offset - z.next; skip > 0 {
		m, err := io.CopyN(io.Discard, z.z, skip)
		z.next, z.last = z.next+m, z.last[:0]
		if err != nil {
			return 0, err
		}
	}
	for n < len(b) && !z.end {
		m, err := z.z.Read(b[n:])
		n += m
		z.next += int64(m)
		if errors.Is(err, io.EOF) {
			z.end = true
		} else if err != nil {
			return n, err
		}
	}
	z.last = append(z.last[:0], b[:n]...)
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

// inflatedSize is the size of the content as the file's last four bytes say (RFC 1952,
// section 2.3.1: modulo 2^32; kubelet's files are smaller).
func inflatedSize(file *os.File, size int64) (int64, error) {
	if size < 18 {
		return 0, fmt.Errorf("%s has %d bytes; no gzip file is so short", file.Name(), size)
	}
	var b [4]byte
	if _, err := file.ReadAt(b[:], size-4); err != nil {
		return 0, err
	}
	return int64(binary.LittleEndian.Uint32(b[:])), nil
}
