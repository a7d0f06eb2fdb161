package tail

import (
	"regexp"
	"testing"
)

func FuzzLogName(f *testing.F) {
	re := regexp.MustCompile(`^([0-9]+)\.log(\.[0-9]{8}-[0-9]{6})?(\.gz|\.tmp)?$`)
	for _, s := range []string{"0.log", "12.log.20261123-195300", "0.log.20261123-195300.gz", "0.log.20261123-195300.gz.tmp", "0.log.gz", "0.log.tmp", "0.log.", "a.log", "0.log.20261123-195300.tmp", "0.log.20261123195300-", "0.log-20261123-195300", "0.log.log", "0.log.2026112-1195300", "\u0661.log"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		m := re.FindStringSubmatch(name)
		base, temporary, ok := logName(name)
		if ok != (m != nil) || ok && (base != m[1]+".log" || temporary != (m[3] == ".tmp")) {
			t.Errorf("%q: %q %v %v; the pattern says %q", name, base, temporary, ok, m)
		}
	})
}
