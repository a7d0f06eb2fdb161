package pipeline

import (
	"fmt"
	"path/filepath"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/internal/rules"
)

const (
	quotasMagic   = "outrigger-quotas"
	maxQuotasFile = 16 << 20
	// quotasEvery is how much time there is between two saves of what quotas have
	// counted, at least: so much of a namespace's day is forgotten in a crash.
	quotasEvery = time.Second
)

// decodeQuotas reads a file of counts. Whether they are within their limits is for
// rules.Set.Restore to say.
func decodeQuotas(b []byte) (rules.State, error) {
	var state rules.State
	if err := unseal(quotasMagic, b, &state); err != nil {
		return nil, err
	}
	return state, nil
}

func (p *Pipeline) loadQuotas() {
	p.quotas = &keptFile{
		path: filepath.Join(p.cfg.DataDir, p.cfg.Name+".quotas"), max: maxQuotasFile,
		what: "counts of the quotas", every: quotasEvery, log: p.log,
	}
	p.quotas.load(func(b []byte) error {
		state, err := decodeQuotas(b)
		if err != nil {
			return err
		}
		if err := p.cfg.Rules.Restore(state, time.Now()); err != nil {
			return fmt.Errorf("%w: %w", errDamaged, err)
		}
		return nil
	})
	p.quotasSaved = p.cfg.Rules.Counts()
}

func (p *Pipeline) saveQuotas(now bool) {
	counts := p.cfg.Rules.Counts() // before the state: what is counted meanwhile is saved next time
	if p.quotas.save(now, func() ([]byte, error) {
		if counts == p.quotasSaved {
			return nil, nil
		}
		return seal(quotasMagic, p.cfg.Rules.State(time.Now()))
	}) {
		p.quotasSaved = counts
	}
}
