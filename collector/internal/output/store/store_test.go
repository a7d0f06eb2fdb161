package store_test

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/internal/output"
	outputstore "github.com/outrigger-mesh/outrigger/collector/internal/output/store"
	"github.com/outrigger-mesh/outrigger/collector/internal/store"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// What the store keeps is acknowledged, what it refuses is rejected with the
// reason, and an attempt that fails acknowledges nothing.
func TestVerdicts(t *testing.T) {
	s, err := store.Open(store.Config{Folder: t.TempDir()}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	var o output.Output = outputstore.New(s)
	now := time.Now()
	batch := []*record.Record{
		{Time: now, Body: "one", Origin: record.Origin{File: "f", Offset: 1}},
		{Time: now.AddDate(-1, 0, 0), Body: "old", Origin: record.Origin{File: "f", Offset: 2}},
	}
	r := o.Write(t.Context(), batch)
	if r.Err != nil || len(r.Retry) != 0 || len(r.Rejected) != 1 || r.Rejected[0].Index != 1 || r.Rejected[0].Reason == "" {
		t.Errorf("%+v; want record 1 rejected with a reason", r)
	}
	found := 0
	for _, err := range s.Search(t.Context(), store.Query{}) {
		if err != nil {
			t.Fatal(err)
		}
		found++
	}
	if found != 1 {
		t.Errorf("%d records found; want 1", found)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if r := o.Write(ended, batch[:1]); !errors.Is(r.Err, context.Canceled) {
		t.Errorf("after the context has ended: %+v; want its error", r)
	}
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	if r := o.Write(t.Context(), batch[:1]); r.Err == nil {
		t.Error("a closed store acknowledged a record")
	}
}
