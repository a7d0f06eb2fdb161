package tail_test

import (
	"context"
	"log/slog"
	"os"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/internal/ledger"
	"github.com/outrigger-mesh/outrigger/collector/internal/tail"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// What TestRandom has found, one by one.

// The oldest file is deleted, the new log file gets its inode and is rotated before anybody
// looks: it is another file, and comes last.
func TestInodeReusedAndRotated(t *testing.T) {
	n := start(t)
	n.write(cart, "F 1")
	n.rotate(rotatedA, "F 2")
	n.want("1", "2")
	n.rename(rotatedA, "aside") // keeps the inode
	n.rename(cart, rotatedB)
	n.must(os.Truncate(n.path("aside"), 0))
	n.rename("aside", cart)
	n.write(cart, "F 3") // as long as the file was that had the inode
	n.rotate(rotatedC, "F 4")
	n.want("3", "4")
	n.closed(nil)
}

// Overwritten in place, and by the next look as long as it was.
func TestOverwrittenWithAsMuch(t *testing.T) {
	n := start(t)
	n.write(cart, "F 1")
	n.want("1")
	n.must(os.Truncate(n.path(cart), 0))
	n.write(cart, "F 2")
	n.must(os.Chtimes(n.path(cart), n.now, n.now))
	n.want("2")
	n.closed(nil)
}

// Seen, overwritten before it was read, and by then as long as what was read of it.
func TestOverwrittenWithAsMuchAsWasRead(t *testing.T) {
	n := start(t)
	n.write(cart, "F 1")
	n.want("1")
	n.write(cart, "F 2")
	n.f.Sweep(true, nil, nil)
	n.must(os.Truncate(n.path(cart), 0))
	n.write(cart, "F 3")
	n.want("3")
	n.closed(map[string]int64{"truncated": 42})
}

// Overwritten, rotated, and there is a new one, when its turn comes.
func TestOverwrittenComesBeforeTheNext(t *testing.T) {
	n := spooled(t)
	n.write(cart, "F 1", "F 2")
	n.want("1", "2")
	n.must(os.Truncate(n.path(cart), 0))
	n.write(cart, "F 3")
	n.rename(cart, rotatedA)
	n.write(cart, "F 4")
	n.remove(rotatedA)
	n.want("3", "4")
	n.closed(nil)
}

// Compressed before the first line, of which half was there at the last look, or another first
// line could be seen.
func TestCompressedBeforeItIsKnown(t *testing.T) {
	for _, truncated := range []bool{false, true} {
		n := start(t)
		n.raw(cart, "2026-11-23T02:00:00Z std")
		if truncated {
			n.raw(cart, "out F 0\n")
		}
		n.f.Sweep(true, nil, nil)
		if truncated {
			n.must(os.Truncate(n.path(cart), 0))
			n.raw(cart, "2026-11-23T02:00:00.5Z std")
		}
		n.raw(cart, "out F 1\n")
		n.rotate(rotatedA, "F 2")
		n.compress(rotatedA)
		n.want("1", "2")
		n.stop()
		n.follow()
		n.want()
	}
}

// Its first line is whole only when the file has another name: it gets its link all the same.
func TestLinkOfARenamedFile(t *testing.T) {
	n := spooled(t)
	n.raw(cart, "2026-11-23T02:00:00Z std")
	n.f.Sweep(true, nil, nil)
	n.raw(cart, "out F 1\n")
	n.rename(cart, rotatedA)
	n.f.Read(func(tail.Entry) bool { return true }) // and is not settled
	n.f.Sweep(true, nil, nil)
	n.remove(rotatedA)
	n.restart()
	n.want("1")
	n.closed(nil)
}

// An empty file has no account, and its copy gives it none: a checkpoint with one would be
// taken for damaged.
func TestCompressedEmpty(t *testing.T) {
	n := start(t)
	n.write(cart, "F 1")
	n.want("1")
	n.must(os.Truncate(n.path(cart), 0))
	n.rotate(rotatedA, "F 2")
	n.f.Sweep(true, nil, nil)
	n.compress(rotatedA)
	n.want("2")
	b, err := n.ledger.Encode()
	n.must(err)
	if _, err := ledger.Decode(b); err != nil {
		t.Error(err)
	}
}

// What a rule has taken is a gap: a line does not go on behind it.
func TestOffIsAGap(t *testing.T) {
	n := start(t)
	n.stop()
	off, generation := false, uint64(0)
	n.config.Policy = func(*record.Resource) tail.Policy {
		if off {
			return tail.Policy{Off: "annotation"}
		}
		return tail.Policy{}
	}
	n.config.Generation = func() uint64 { return generation }
	n.config.Resource = func(from *record.Resource) (*record.Resource, bool) {
		r := *from
		return &r, true
	}
	n.follow()
	n.write(cart, "F 1", "P be")
	n.want("1")
	off, generation = true, 1
	n.write(cart, "F gin", "P on")
	n.want("be")
	off, generation = false, 2
	n.write(cart, "F ce")
	n.want("ce")
	n.closed(map[string]int64{"rule": 44 + 43})
}

// Two kept files were last written to in the same tick of the file system's clock.
func TestSpoolOrderWithinATick(t *testing.T) {
	n := spooled(t)
	n.raw("aside", "") // so that the younger has the lower number
	n.write(cart, "F 1")
	n.rename(cart, rotatedA)
	n.rename("aside", cart)
	n.write(cart, "F 2")
	n.f.Sweep(true, nil, nil)
	n.stop()
	at := time.Now()
	for _, name := range []string{cart, rotatedA} {
		n.must(os.Chtimes(n.path(name), at, at))
	}
	n.must(os.RemoveAll(n.path(folder)))
	n.restart()
	n.want("1", "2")
	n.closed(nil)
}

// between does something when a folder was listed that has a file which is no log, and nothing of
// it was opened.
type between struct {
	slog.Handler
	do *func()
}

func (h between) Enabled(context.Context, slog.Level) bool { return true }

func (h between) Handle(_ context.Context, r slog.Record) error {
	if do := *h.do; do != nil && r.Message == "file is not read" {
		*h.do = nil
		do()
	}
	return nil
}

// While the folder of a new log is listed, it is rotated: the file that was listed comes first.
func TestRotatedWhileListed(t *testing.T) {
	n := start(t)
	n.stop()
	do := func() { n.rotate(rotatedA, "F gin") }
	n.f = tail.New(n.config, n.ledger, slog.New(between{slog.DiscardHandler, &do}), n.metrics)
	n.write(cart, "F 1", "P be")
	n.raw(folder+"/app/x", "")
	n.want("1", "begin")
	n.closed(nil)
}

// The same in the first sweep after a restart: the file is not taken for deleted while away.
func TestRotatedWhileListedAfterARestart(t *testing.T) {
	n := start(t)
	n.write(cart, "F 1")
	n.want("1")
	n.stop()
	do := func() { n.rename(cart, rotatedA) }
	n.write(cart, "F 2")
	n.raw(folder+"/app/x", "")
	n.f = tail.New(n.config, n.ledger, slog.New(between{slog.DiscardHandler, &do}), n.metrics)
	n.want("2")
	n.closed(nil)
}
