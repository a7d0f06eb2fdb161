package pipeline

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/outrigger-mesh/outrigger/collector/internal/ledger"
	"github.com/outrigger-mesh/outrigger/collector/internal/rules"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

func someReasons() *reasons {
	w := newReasons(time.Date(2026, 11, 26, 3, 0, 0, 0, time.UTC))
	at := time.Date(2026, 11, 26, 3, 1, 0, 5, time.UTC)
	shop := &record.Resource{Namespace: "shop", Pod: "cart-0", Container: "app"}
	for i := range 5 {
		w.note(&record.Record{Resource: shop, Time: at, Body: fmt.Sprintf("<line> %d", i)}, ledger.ByRule, "no-health", 100)
	}
	w.note(&record.Record{Resource: shop, Time: at, Body: "x\xff" + strings.Repeat("é", 200)}, ledger.Rejected, strings.Repeat("\xff€", 1000), 1)
	w.note(&record.Record{Time: time.Date(20000, 1, 1, 0, 0, 0, 0, time.UTC)}, ledger.ByQuota, "q", 1)
	return w
}

func TestReasonsAreReadBack(t *testing.T) {
	w := someReasons()
	b, _, err := w.encode()
	if err != nil {
		t.Fatal(err)
	}
	back, err := decodeReasons(b)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(w.list("o"), back.list("o")); d != "" || !back.since.Equal(w.since) || back.bytes != w.bytes {
		t.Errorf("since %v, %d bytes; want %v, %d (-want +got):\n%s", back.since, back.bytes, w.since, w.bytes, d)
	}
	if again, _, err := back.encode(); again != nil || err != nil {
		t.Errorf("nothing was noted since, and %d bytes are to be saved, %v", len(again), err)
	}
	body := b[bytes.IndexByte(b, '\n')+1:]
	for _, damaged := range [][]byte{
		nil, b[:len(b)-1], append(bytes.Clone(b), ' '), bytes.Replace(b, []byte("reasons 1"), []byte("reasons 2"), 1), body,
		resealed(body, `"records":5`, `"records":-5`), resealed(body, `"records":5`, `"records":5,"more":1`),
		resealed(body, `"cause":"rule"`, `"cause":"acknowledged"`), resealed(body, `"since":"2026`, `"since":"x`),
		resealed(body, `"namespace":"shop"`, `"namespace":"`+strings.Repeat("x", 254)+`"`),
		resealed(append(bytes.Clone(body), "{}"...), "", ""),
	} {
		if _, err := decodeReasons(damaged); !errors.Is(err, errDamaged) {
			t.Errorf("%.100q: error %v", damaged, err)
		}
	}
}

func resealed(body []byte, from, to string) []byte {
	body = bytes.Replace(body, []byte(from), []byte(to), 1)
	return append([]byte(header(reasonsMagic, body)+"\n"), body...)
}

// Samples are a list also where there are none, so that no reader finds null.
func TestSumWithoutSamples(t *testing.T) {
	w := newReasons(time.Now())
	for i := range maxReasons + 1 {
		w.unread(&record.Resource{Pod: strconv.Itoa(i)}, "off", time.Now())
	}
	for _, x := range w.list("o") {
		if x.Samples == nil {
			t.Errorf("%q has no list", x.Pod)
		}
	}
}

// Samples that come after all reasons are there count towards the limit, too.
func TestLateSamplesAreBounded(t *testing.T) {
	w := newReasons(time.Now())
	rule, body := strings.Repeat("\x01", maxReasonBytes/maxReasons-2*maxSample), strings.Repeat("\x01", maxSample)
	for range maxSamples {
		for i := range maxReasons {
			w.note(&record.Record{Resource: &record.Resource{Pod: strconv.Itoa(i)}, Body: body}, ledger.Rejected, rule, 10)
		}
	}
	b, _, err := w.encode()
	if err != nil || len(b) > maxReasonsFile || w.bytes > maxReasonBytes+4096 {
		t.Errorf("%d bytes in memory, %d in the file, %v", w.bytes, len(b), err)
	}
}

// Pods come and go for years: memory and file stay bounded, what is new has its
// name, and no record is left out of the sums.
func TestReasonsAreBounded(t *testing.T) {
	w := newReasons(time.Now())
	const pods = 3 * maxReasons
	body := strings.Repeat("\x01", 2*maxSample)
	for i := range pods {
		from := &record.Resource{Namespace: "shop", Pod: fmt.Sprintf("%0253d", i)}
		for range 4 {
			w.note(&record.Record{Resource: from, Body: body}, ledger.Rejected, strings.Repeat("\x01", 2*maxRule), 10)
		}
	}
	var records, size int64
	newest := false
	for _, x := range w.list("o") {
		records += x.Records
		size += x.Bytes
		newest = newest || x.Pod == fmt.Sprintf("%0253d", pods-1)
	}
	if records != 4*pods || size != 40*pods || !newest {
		t.Errorf("%d records of %d bytes, the newest is named: %v; want %d, %d", records, size, newest, 4*pods, 40*pods)
	}
	b, _, err := w.encode()
	if err != nil || len(b) > maxReasonsFile || w.bytes > maxReasonBytes+4096 {
		t.Errorf("%d bytes in memory, %d in the file, %v", w.bytes, len(b), err)
	}
	if _, err := decodeReasons(b); err != nil {
		t.Error(err)
	}
}

func TestDamagedFileIsSetAside(t *testing.T) {
	var told bytes.Buffer
	k := keptFile{path: filepath.Join(t.TempDir(), "out.reasons"), max: 10, what: "reasons", log: slog.New(slog.NewTextHandler(&told, nil))}
	for _, text := range []string{"damaged", "longer than the limit"} {
		if err := os.WriteFile(k.path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		k.load(func([]byte) error { return errDamaged })
		if b, err := os.ReadFile(k.path + ".damaged"); err != nil || string(b) != text || !strings.Contains(told.String(), k.path) {
			t.Errorf("set aside: %q, %v; told: %s", b, err, told.String())
		}
		if _, err := os.Stat(k.path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the damaged file: %v", err)
		}
	}
	// A folder in its place can be neither read nor replaced: told, no more.
	if err := os.Mkdir(k.path, 0o700); err != nil {
		t.Fatal(err)
	}
	told.Reset()
	k.load(func([]byte) error { return nil })
	if k.save(true, func() ([]byte, error) { return []byte("x"), nil }) || strings.Count(told.String(), "level=ERROR") != 2 {
		t.Errorf("told: %s", told.String())
	}
}

func FuzzDecodeReasons(f *testing.F) {
	b, _, err := someReasons().encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b[bytes.IndexByte(b, '\n')+1:], true)
	f.Add(b, false)
	f.Fuzz(func(t *testing.T, b []byte, sealed bool) {
		if sealed {
			b = resealed(b, "", "")
		}
		w, err := decodeReasons(b)
		if err != nil {
			if !errors.Is(err, errDamaged) {
				t.Fatal(err)
			}
			return
		}
		w.note(&record.Record{Body: "more"}, ledger.ByRule, "r", 1)
		again, _, err := w.encode()
		if err != nil {
			t.Fatal(err)
		}
		back, err := decodeReasons(again)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(w.list(""), back.list("")); d != "" {
			t.Fatalf("(-want +got):\n%s", d)
		}
	})
}

func FuzzDecodeQuotas(f *testing.F) {
	f.Add([]byte(`[{"quota":"q","namespace":"shop","days":[{"day":20783,"bytes":500}],"judged":[{"file":"f","stream":"stdout","end":500,"over":[[300,500]]}]}]`))
	f.Fuzz(func(t *testing.T, body []byte) {
		state, err := decodeQuotas(append([]byte(header(quotasMagic, body)+"\n"), body...))
		if err != nil {
			if !errors.Is(err, errDamaged) {
				t.Fatal(err)
			}
			return
		}
		c := rules.Config{Quotas: []rules.Quota{{Name: "q", BytesPerDay: 100, Action: "drop"}}}
		set, err := rules.Compile(c, "o", nil)
		if err != nil {
			t.Fatal(err)
		}
		now := time.Date(2026, 11, 26, 3, 0, 0, 0, time.UTC)
		if set.Restore(state, now) != nil {
			return
		}
		set.For(&record.Resource{Namespace: "shop"}).Apply(&record.Record{Time: now, Body: "more", Origin: record.Origin{File: "f", Offset: 500}})
		kept := set.State(now)
		b, err := seal(quotasMagic, kept)
		if err != nil {
			t.Fatal(err)
		}
		if state, err = decodeQuotas(b); err == nil {
			err = set.Restore(state, now)
		}
		if err != nil {
			t.Fatalf("%+v is refused: %v", kept, err)
		}
	})
}
