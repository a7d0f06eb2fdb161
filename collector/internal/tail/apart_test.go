package tail_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/outrigger-mesh/outrigger/collector/internal/tail"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

const (
	rotatedA = cart + ".20261123-030000"
	rotatedB = cart + ".20261123-030100"
	rotatedC = cart + ".20261123-030200"
)

// rotate does what kubelet and the runtime do.
func (n *node) rotate(to string, lines ...string) {
	n.t.Helper()
	n.rename(cart, to)
	n.write(cart, lines...)
}

func (n *node) remove(names ...string) {
	n.t.Helper()
	for _, name := range names {
		n.must(os.Remove(n.path(name)))
	}
}

func (n *node) noEnd(want float64) {
	n.t.Helper()
	if got := testutil.ToFloat64(n.metrics.Malformed.WithLabelValues("no_end")); got != want {
		n.t.Errorf("%v records without their end are counted; want %v", got, want)
	}
}

// While nobody looks, a generation is rotated and deleted unseen. What is open in the one
// before it, which the spool has kept, does not go on in the one after it.
func TestUnseenGenerationWhileAway(t *testing.T) {
	n := spooled(t)
	n.write(cart, "F 1", "P be")
	n.want("1")
	n.stop()
	n.rotate(rotatedA, "F gin", "P on")
	n.rotate(rotatedB, "F ce", "F 2")
	n.remove(rotatedA, rotatedB)
	n.restart()
	es := n.want("be", "ce", "2")
	n.closed(nil)
	n.noEnd(1)
	if left := n.links(); len(left) != 1 {
		t.Errorf("one file is in use and the spool has %v", left)
	}
	if len(es) == 3 && es[0].Record.Origin == es[1].Record.Origin {
		t.Errorf("two records have the origin %+v", es[0].Record.Origin)
	}
}

// The generation before has a name, or had one when the next was first seen: nothing lies
// between them.
func TestSeenGenerationsAreJoined(t *testing.T) {
	n := spooled(t)
	n.write(cart, "F 1", "P be")
	n.want("1")
	n.stop()
	n.rotate(rotatedA, "F gin", "P on")
	n.restart()
	n.want("begin")
	n.stop()
	n.rotate(rotatedB, "F ce", "P la")
	n.compress(rotatedA)
	n.restart()
	n.want("once")
	n.rotate(rotatedC, "F st")
	n.f.Sweep(true, nil, nil) // sees both, and reads none
	n.stop()
	n.remove(rotatedA+".gz", rotatedB, rotatedC, cart)
	n.restart()
	n.want("last")
	n.closed(nil)
	n.noEnd(0)
}

// Compressed while nobody looks: a name is a name.
func TestCompressedGenerationIsJoined(t *testing.T) {
	n := spooled(t)
	n.write(cart, "F 1", "P be")
	n.want("1")
	n.stop()
	n.rotate(rotatedA, "P g")
	n.rotate(rotatedB, "F in", "F 2")
	n.compress(rotatedA)
	n.restart()
	n.want("begin", "2")
	n.closed(nil)
	n.noEnd(0)
}

// That a generation does not follow the one before is known to the next process as well,
// whose listing shows neither.
func TestApartOverARestart(t *testing.T) {
	n := spooled(t)
	n.write(cart, "F 1", "P be")
	n.want("1")
	n.stop()
	n.rotate(rotatedA, "F gin")
	n.rotate(rotatedB, "F ce")
	n.remove(rotatedA, rotatedB)
	n.restart()
	n.f.Sweep(true, nil, nil)
	n.stop()
	n.remove(cart)
	n.restart()
	n.want("be", "ce")
	n.closed(nil)
	n.noEnd(1)
	if left := n.links(); len(left) != 0 {
		t.Errorf("the spool has %v", left)
	}
}

// Two rotations between two looks, and kubelet has deleted what was there before.
func TestUnseenGenerationBetweenSweeps(t *testing.T) {
	for _, spool := range []bool{false, true} {
		t.Run(fmt.Sprintf("spool=%v", spool), func(t *testing.T) {
			n := start(t)
			if spool {
				n = spooled(t)
			}
			n.write(cart, "F 1", "P be")
			n.want("1")
			n.rotate(rotatedA, "F gin", "P on")
			n.rotate(rotatedB, "F ce", "P f")
			n.remove(rotatedA, rotatedB)
			n.want("be", "ce")
			n.rotate(rotatedC, "F our") // seen
			n.want("four")
			n.closed(nil)
			n.noEnd(1)
			if files := n.ledger.Files(); len(files) != 2 {
				t.Errorf("%d accounts are open with two files left: %+v", len(files), files)
			}
		})
	}
}

// Records of several lines are let go as well. Of the last line of A nobody knows whether
// more of its record came.
func TestUnseenGenerationOfMultiLine(t *testing.T) {
	n := spooled(t)
	n.stop()
	n.config.Policy = func(*record.Resource) tail.Policy {
		return tail.Policy{Grouper: func() tail.Grouper { return &trace{} }}
	}
	n.follow()
	n.write(cart, "F 1", "F panic:", "F  at a")
	n.settle(n.read(1)...)
	n.stop()
	n.rotate(rotatedA, "F  at b", "F end")
	n.rotate(rotatedB, "F  at c", "F 2")
	n.remove(rotatedA, rotatedB)
	n.restart()
	n.want("panic:\n at a", " at c", "2")
	n.closed(nil)
	n.noEnd(0)
}

// The end of a line is given up, because deleted files may occupy only so much; what comes
// next is another line.
func TestGivenUpEndIsNotJoined(t *testing.T) {
	n := spooled(t)
	n.stop()
	n.config.MaxDeleted = 10
	n.follow()
	n.write(cart, "F 1", "P be")
	n.raw(cart, "2026-11-23T02:00:01Z stderr F between\n")
	n.write(cart, "F gin")
	n.settle(n.read(2)...) // 1 and between
	n.rotate(rotatedA, "F 2")
	n.f.Sweep(true, nil, nil)
	n.remove(rotatedA)
	n.f.Sweep(true, nil, nil)
	n.want("be", "2")
	n.noEnd(1)
	n.closed(map[string]int64{"rotated_away": 44})
}

// A compressed generation that cannot be read lies between two others.
func TestDamagedGenerationIsAGap(t *testing.T) {
	n := start(t)
	n.write(cart, "F 1", "P be")
	n.want("1")
	n.stop()
	n.rotate(rotatedA, "F gin", "P on")
	n.rotate(rotatedB, "F ce")
	n.compress(rotatedA)
	n.compress(rotatedB)
	n.must(os.WriteFile(n.path(rotatedB+".gz"), []byte("\x1f\x8b"), 0o600))
	n.rotate(rotatedC, "F 2")
	n.restart()
	n.want("be", "ce", "2")
	n.noEnd(1)
}

// Docker's logs are links, and the files that they lead to are rotated where they are.
func TestLinkedLogIsRotated(t *testing.T) {
	n := start(t)
	n.stop()
	outside := t.TempDir()
	n.config.Linked = []string{outside}
	n.follow()
	target := filepath.Join(outside, "abc-json.log")
	docker := func(text string) {
		t.Helper()
		n.stamp++
		f, err := os.OpenFile(target, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
		n.must(err)
		_, err = fmt.Fprintf(f, `{"log":%q,"stream":"stdout","time":"2026-11-23T03:00:00.%09dZ"}`+"\n", text, n.stamp)
		n.must(err)
		n.must(f.Close())
	}
	rotate := func() {
		t.Helper()
		if _, err := os.Stat(target + ".1"); err == nil {
			n.must(os.Rename(target+".1", target+".2"))
		}
		n.must(os.Rename(target, target+".1"))
	}
	docker("1\n")
	docker("be")
	n.must(os.MkdirAll(filepath.Dir(n.path(cart)), 0o750))
	n.must(os.Symlink(target, n.path(cart)))
	n.want("1")
	rotate()
	docker("gin\n")
	docker("on")
	n.want("begin")
	rotate()
	docker("ce\n")
	rotate()
	docker("2\n")
	n.want("on", "2")
	n.closed(nil)
	n.noEnd(1)
	if files := n.ledger.Files(); len(files) != 1 {
		t.Errorf("%d accounts are open and one file is followed: %+v", len(files), files)
	}
}

// A rotated single file that nobody followed lies between two that are.
func TestUnseenSingleFile(t *testing.T) {
	n := start(t)
	n.stop()
	dir := t.TempDir()
	n.config.Files = []tail.Files{{Patterns: []string{filepath.Join(dir, "app.log")}, Resource: record.Resource{Service: "x"}, Format: tail.Text}}
	n.config.Policy = func(*record.Resource) tail.Policy {
		return tail.Policy{Grouper: func() tail.Grouper { return &trace{} }}
	}
	n.follow()
	path := filepath.Join(dir, "app.log")
	at := time.Date(2026, 11, 23, 2, 0, 0, 0, time.Local)
	put := func(text string) {
		t.Helper()
		n.must(os.WriteFile(path, []byte(text), 0o600))
		at = at.Add(time.Minute)
		n.must(os.Chtimes(path, at, at))
	}
	put("1\npanic:\n at a\n")
	n.settle(n.read(1)...)
	n.stop()
	n.must(os.Rename(path, path+".2"))
	put(" at b\nend\n")
	n.must(os.Rename(path, path+".1"))
	put(" at c\n2\n")
	n.restart()
	n.want("panic:\n at a", " at c", "2")
	n.closed(nil)
}

// The generations in the spool come in the order of their last writes, not in that of their
// inodes.
func TestSpoolOrder(t *testing.T) {
	n := spooled(t)
	n.write(cart, "F 1")
	n.rotate(rotatedA, "F 2")
	n.rotate(rotatedB, "F 3")
	n.f.Sweep(true, nil, nil)
	n.stop()
	for i, name := range []string{cart, rotatedB, rotatedA} {
		at := n.now.Add(time.Duration(i-60) * time.Minute)
		n.must(os.Chtimes(n.path(name), at, at))
	}
	n.remove(rotatedA, rotatedB, cart)
	n.restart()
	n.want("3", "2", "1")
	n.closed(nil)
}

// A generation whose rename was missed is read before those with names, although the clock of
// kubelet, which stamps these, is days behind that of the file system.
func TestNamelessComesFirst(t *testing.T) {
	for _, spool := range []bool{false, true} {
		t.Run(fmt.Sprintf("spool=%v", spool), func(t *testing.T) {
			n := start(t)
			if spool {
				n = spooled(t)
			}
			n.write(cart, "F 1", "F 2")
			n.f.Sweep(true, nil, nil)
			n.rotate(rotatedA, "F 3")
			n.rotate(rotatedB, "F 4")
			n.remove(rotatedA)
			n.f.Sweep(true, nil, nil)
			n.rotate(rotatedC, "F 5")
			n.want("1", "2", "3", "4", "5")
			n.closed(nil)
		})
	}
}

// A rename is half seen: the live file has lost its name to the next one, and its stamp is not
// known yet. It keeps its place, whatever the stamps of others say.
func TestHalfSeenRenameKeepsItsPlace(t *testing.T) {
	n := spooled(t)
	n.write(cart, "F 1")
	n.rotate(cart+".20991231-000000", "F 2")
	n.f.Sweep(true, nil, nil)
	n.rename(cart, "aside")
	n.write(cart, "F 3")
	n.f.Sweep(true, nil, nil)
	n.rename("aside", cart+".20991231-000001")
	n.want("1", "2", "3")
	n.closed(nil)
	n.noEnd(0)
}

// Renamed and compressed since the last look, and the listing is too old to have its name: what
// was read of it is not read again.
func TestHalfSeenCompression(t *testing.T) {
	n := spooled(t)
	n.write(cart, "F 1")
	es := n.read(10)
	n.now = n.now.Add(2 * time.Second) // quiet for long enough
	n.rotate(rotatedA, "F 2")
	n.compress(rotatedA)
	n.rename(rotatedA+".gz", "aside")
	es = append(es, n.read(10)...)
	n.rename("aside", rotatedA+".gz")
	for range 4 {
		es = append(es, n.read(10)...)
		n.now = n.now.Add(1500 * time.Millisecond)
	}
	if len(es) != 2 || es[0].Record.Body != "1" || es[1].Record.Body != "2" {
		t.Errorf("%d records; want 1 and 2 once each", len(es))
	}
	n.settle(es...)
	n.closed(nil)
}
