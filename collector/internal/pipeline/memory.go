package pipeline

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"time"

	"github.com/outrigger-mesh/outrigger/atomicfile"
	"github.com/outrigger-mesh/outrigger/collector/internal/ledger"
	"github.com/outrigger-mesh/outrigger/collector/internal/rules"
)

// Limits of what is remembered over a restart.
const (
	memoryVersion = 1
	maxMemory     = 16 << 20        // bytes of the file
	rememberEvery = 5 * time.Second // at most, while it changes
	reasonsFor    = 7 * 24 * time.Hour
)

// memory is what a pipeline remembers beside the account: for people, why records were
// dropped, and for quotas, how much of the day is used. No line depends on it, so after a
// crash it may be some seconds old.
type memory struct {
	Version int           `json:"version"`
	Since   time.Time     `json:"since"` // the first reason is not older
	Reasons []Reason      `json:"reasons"`
	Quotas  []rules.Usage `json:"quotas"`
}

func (p *Pipeline) memoryPath() string {
	return filepath.Join(p.cfg.DataDir, p.cfg.Name+".memory.json")
}

// remember takes over what an earlier process or configuration has written. What cannot be
// read is set aside and told.
func (p *Pipeline) remember(now time.Time) {
	p.memorySeed = maphash.MakeSeed()
	path := p.memoryPath()
	m, err := readMemory(path)
	if err != nil {
		aside := path + ".damaged"
		if err := os.Rename(path, aside); err != nil {
			aside = path
		}
		p.log.Error("what was remembered of dropped records and of quotas cannot be read; it begins anew, and no line is concerned",
			"file.path", aside, "error.message", err.Error())
	}
	p.why.restore(m, now)
	p.cfg.Rules.Restore(m.Quotas)
}

func readMemory(path string) (memory, error) {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return memory{}, nil
	case err != nil:
		return memory{}, err
	case info.Size() > maxMemory:
		return memory{}, fmt.Errorf("it has %d bytes, and %d are written at most", info.Size(), maxMemory)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return memory{}, err
	}
	return decodeMemory(b)
}

// decodeMemory is strict: what it returns could have been written here.
func decodeMemory(b []byte) (memory, error) {
	var m memory
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&m); err != nil {
		return memory{}, err
	}
	if d.More() {
		return memory{}, errors.New("something follows the object")
	}
	if m.Version != memoryVersion {
		return memory{}, fmt.Errorf("version %d is not known; this program writes %d", m.Version, memoryVersion)
	}
	if n := maxReasons + len(ledger.Drops()); len(m.Reasons) > n {
		return memory{}, fmt.Errorf("%d reasons; there are %d at most", len(m.Reasons), n)
	}
	for i, r := range m.Reasons {
		_, known := causeOf(r.Cause)
		switch {
		case !known:
			return memory{}, fmt.Errorf("reason %d: cause %q is not known", i, r.Cause)
		case r.Records < 0 || r.Bytes < 0 || r.Records > math.MaxInt64/2 || r.Bytes > math.MaxInt64/2:
			return memory{}, fmt.Errorf("reason %d: %d records of %d bytes", i, r.Records, r.Bytes)
		case len(r.Samples) > maxSamples:
			return memory{}, fmt.Errorf("reason %d: %d samples; there are %d at most", i, len(r.Samples), maxSamples)
		}
		for _, s := range r.Samples {
			if len(s) > maxSample+len("…") {
				return memory{}, fmt.Errorf("reason %d: a sample of %d bytes; %d are kept", i, len(s), maxSample)
			}
		}
	}
	return m, rules.CheckUsages(m.Quotas)
}

func causeOf(name string) (ledger.Cause, bool) {
	for _, c := range ledger.Drops() {
		if c.String() == name {
			return c, true
		}
	}
	return 0, false
}

// saveMemory writes what is remembered, if it changed. A failure costs no line: it is told, and
// tried again.
func (p *Pipeline) saveMemory(now time.Time) {
	p.why.forget(now.Add(-reasonsFor))
	b, err := json.Marshal(memory{Version: memoryVersion, Since: p.why.since(), Reasons: p.why.list(""), Quotas: p.cfg.Rules.Usages()})
	if sum := maphash.Bytes(p.memorySeed, b); err == nil && sum != p.memorySum {
		if err = atomicfile.Write(p.memoryPath(), b, 0o600); err == nil {
			p.memorySum = sum
		}
	}
	if err != nil && now.Sub(p.memoryFailed) >= time.Minute {
		p.memoryFailed = now
		p.log.Warn("cannot save the reasons of dropped records and the counts of quotas; after a restart they would begin anew, and no line is concerned",
			"file.path", p.memoryPath(), "error.message", err.Error())
	}
}
