package pipeline_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/outrigger-mesh/outrigger/collector/internal/pipeline"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// A log that an annotation switches off is not read, and why says so all the same.
func TestWhyOfALogThatIsNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.cfg.Tail.Resource = func(from *record.Resource) (*record.Resource, bool) {
			to := *from
			to.Annotations = map[string]string{"outrigger.dev/logs": "off"}
			return &to, true
		}
		r.write("shop_silent_uid/app/0.log", 0, 10)
		b := &backend{}
		p := r.open(b)
		stop := r.run(p)
		time.Sleep(time.Minute)
		synctest.Wait()
		stop()
		_, got := p.Why()
		for i := range got {
			if got[i].Last.IsZero() {
				t.Error("the time when it was decided is missing")
			}
			got[i].Last = time.Time{}
		}
		want := []pipeline.Reason{{Output: "out", Namespace: "shop", Pod: "silent", Container: "app", Cause: "rule", Rule: "annotation outrigger.dev/logs: off", Samples: []string{}}}
		if d := cmp.Diff(want, got); d != "" {
			t.Error(d)
		}
		if b.count() != 0 {
			t.Errorf("%d lines were sent", b.count())
		}
		if a := p.Audit(); a.Total.Dropped["rule"] != r.written.Load() {
			t.Errorf("the account has %v, of %d bytes written", a.Total, r.written.Load())
		}
	})
}
