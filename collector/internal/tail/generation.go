package tail

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/internal/ledger"
)

// generation is one file between its creation and its deletion, whatever its
// name is meanwhile.
type generation struct {
	path     string
	dev, ino uint64
	file     *os.File // nil while closed

	// id is empty until the first line is whole; nothing is read before.
	id    string
	first int // bytes that were hashed for it
	hash  [sha256.Size]byte

	offset int64 // next byte to read
	size   int64 // by the last stat
	done   []ledger.Span

	// A physical line longer than a chunk is gathered here from longStart.
	long      []byte
	longCut   int
	longStart int64
	inLong    bool

	modified     time.Time // by the last stat
	quietSince   time.Time // read to the end, and the size unchanged, since
	missingSince time.Time
	gone         bool // deleted: what the open file has is all there is
	replaced     bool // overwritten in place: the file is another generation now
	again        bool // closed as finished, and then seen to have grown

	// before is the generation that this one overwrote in place. If both begin
	// with the same line, times tells them apart.
	before *generation
	times  int
}

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
func (g *generation) open() error {
	if g.file != nil {
		return nil
	}
	file, err := os.Open(g.path)
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
	return nil
}

func (g *generation) close() error {
	if g.file == nil {
		return nil
	}
	err := g.file.Close()
	g.file = nil
	return err
}

// unlinked reports whether the file has no name left.
func (g *generation) unlinked() bool {
	if g.file == nil {
		return false
	}
	info, err := g.file.Stat()
	if err != nil {
		return false
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && st.Nlink == 0
}

// unread is where the bytes begin that no complete line has been made of.
func (g *generation) unread() int64 {
	if g.inLong {
		return g.longStart
	}
	return g.offset
}

// head reads the first n bytes of the file.
func (g *generation) head(n int) ([]byte, error) {
	b := make([]byte, n)
	m, err := g.file.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return b[:m], nil
}

// same reports whether the file still begins with the line that it had.
func (g *generation) same() (bool, error) {
	b, err := g.head(g.first)
	if err != nil {
		return false, err
	}
	return len(b) == g.first && sha256.Sum256(b) == g.hash, nil
}

// identify gives the generation its id and its place, once the first line is
// whole or so long that its beginning will do. A final one takes what there is.
func (f *Follower) identify(g *generation, final bool) error {
	if g.id != "" {
		return nil
	}
	b, err := g.head(firstLine)
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
	g.first, g.hash = len(b), sha256.Sum256(b)
	g.id = fmt.Sprintf("%x-%x-%x", g.dev, g.ino, g.hash[:8])
	if g.before != nil && g.before.hash == g.hash {
		g.times = g.before.times + 1
		g.id = fmt.Sprintf("%s-%d", g.id, g.times)
	}
	g.before = nil
	at := f.book.Open(g.id, g.path)
	g.offset, g.done = at.Offset, at.Above
	return nil
}

// covered reports whether the physical line [start, end) was settled before a
// restart. Lines are asked for in order.
func (g *generation) covered(start, end int64) bool {
	for len(g.done) > 0 && g.done[0].End <= start {
		g.done = g.done[1:]
	}
	return len(g.done) > 0 && g.done[0].Start <= start && end <= g.done[0].End
}
