package installation

import (
	"fmt"
	"strconv"
	"strings"
)

// maxSkew is how many minor versions the oldest sidecar may be behind the
// control plane, and an installation behind the one that replaces it.
const maxSkew = 3

// version is major.minor.patch of a release; builds in between have none.
type version struct{ major, minor, patch int }

// parseVersion reads v1.2.3, 1.2.3 or 1.2.3-rc.1; ok is false for anything else,
// such as the commit of a build that is no release.
func parseVersion(s string) (v version, ok bool) {
	core, _, _ := strings.Cut(strings.TrimPrefix(s, "v"), "+")
	core, _, _ = strings.Cut(core, "-")
	parts := strings.Split(core, ".")
	if len(parts) != 3 {
		return v, false
	}
	for i, to := range []*int{&v.major, &v.minor, &v.patch} {
		n, err := strconv.Atoi(parts[i])
		if err != nil || n < 0 {
			return version{}, false
		}
		*to = n
	}
	return v, true
}

func (v version) compare(w version) int {
	for _, d := range []int{v.major - w.major, v.minor - w.minor, v.patch - w.patch} {
		if d != 0 {
			return d
		}
	}
	return 0
}

// known says whether both are releases, so that they can be compared.
func known(a, b string) bool {
	_, ok := parseVersion(a)
	_, ok2 := parseVersion(b)
	return ok && ok2
}

// Step says why one version cannot replace another: nil where it can, or where
// one of them is no release and nothing can be said.
func Step(from, to string) error {
	f, ok := parseVersion(from)
	t, ok2 := parseVersion(to)
	switch {
	case !ok || !ok2:
		return nil
	case t.compare(f) < 0:
		return fmt.Errorf("%s is older than %s, which is installed: a control plane does not read what a newer one has written. Install the newer one's last patch, or uninstall first", to, from)
	case t.major != f.major:
		return fmt.Errorf("%s is another major version than %s, which is installed: uninstall first, and see the release notes for what has changed", to, from)
	case t.minor-f.minor > maxSkew:
		return fmt.Errorf("%s is %d minor versions ahead of %s, which is installed; sidecars of %d behind are understood. Go by v%d.%d first, and restart the meshed pods there", to, t.minor-f.minor, from, maxSkew, f.major, f.minor+maxSkew)
	}
	return nil
}

// behind is how many minor versions a sidecar is behind its control plane;
// negative where it is ahead. Nothing can be said where ok is false.
func behind(sidecar, plane string) (n int, ok bool) {
	s, ok := parseVersion(sidecar)
	p, ok2 := parseVersion(plane)
	if !ok || !ok2 {
		return 0, false
	}
	if s.major != p.major {
		return (p.major - s.major) * 1000, true
	}
	return p.minor - s.minor, true
}
