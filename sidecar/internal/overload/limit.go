package overload

import (
	"bytes"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
)

// MinLimit is the least memory that a proxy can be given: it takes about 20 MiB
// to start.
const MinLimit = 32 << 20

// Limit is how much memory the process may have, and whose rule that is.
type Limit struct {
	Bytes int64 // 0: none is known
	// cgroup is the folder whose limit is the one in force; empty: another one is.
	cgroup string
}

// ParseLimit reads a number of bytes with an optional suffix Ki, Mi or Gi, as
// Kubernetes writes it. "none" is no limit; empty is the limit of the cgroup, or
// none where that has none.
func ParseLimit(s string) (Limit, error) {
	switch s {
	case "":
		return cgroupLimit("/"), nil
	case "none":
		return Limit{}, nil
	}
	number, shift := s, 0
	for suffix, by := range map[string]int{"Ki": 10, "Mi": 20, "Gi": 30} {
		if n, ok := strings.CutSuffix(s, suffix); ok {
			number, shift = n, by
		}
	}
	n, err := strconv.ParseInt(number, 10, 64)
	if err != nil || n <= 0 || n > 1<<62>>shift {
		return Limit{}, fmt.Errorf("%q is not a number of bytes: write for example 128Mi, or none", s)
	}
	if n <<= shift; n < MinLimit {
		return Limit{}, fmt.Errorf("%q is too little to start with: give at least %dMi", s, MinLimit>>20)
	}
	return Limit{Bytes: n}, nil
}

// cgroupLimit finds the lowest limit between the process's cgroup and the root,
// version 2 or 1. Root is the folder that holds /proc and /sys. What cannot be
// read has no limit: most machines have none.
func cgroupLimit(root string) Limit {
	own, err := os.ReadFile(filepath.Join(root, "proc/self/cgroup"))
	if err != nil {
		return Limit{}
	}
	best := Limit{}
	for line := range strings.Lines(string(own)) {
		// hierarchy:controllers:path (cgroups(7)); version 2 is hierarchy 0.
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		}
		var mount, file string
		switch {
		case parts[0] == "0" && parts[1] == "":
			mount, file = "sys/fs/cgroup", "memory.max"
		case parts[1] == "memory":
			mount, file = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
		default:
			continue
		}
		// In a container the path may be the host's while the mount is the
		// container's own: folders that do not exist are passed over.
		for p := path.Clean("/" + parts[2]); ; p = path.Dir(p) {
			folder := filepath.Join(root, mount, p)
			if n := readNumber(filepath.Join(folder, file)); n >= MinLimit && n < 1<<60 && (best.Bytes == 0 || n < best.Bytes) {
				best = Limit{Bytes: n, cgroup: folder}
			}
			if p == "/" {
				break
			}
		}
	}
	return best
}

// readNumber returns the number that a file holds; 0 where it holds none ("max")
// or cannot be read.
func readNumber(file string) int64 {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0
	}
	n, err := strconv.ParseInt(string(bytes.TrimSpace(b)), 10, 64)
	if err != nil {
		return 0
	}
	return n
}
