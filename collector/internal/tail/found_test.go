package tail_test

import (
	"context"
	"log/slog"
	"testing"

	"github.com/outrigger-mesh/outrigger/collector/internal/tail"
)

// What TestRandom has found, one by one.

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
