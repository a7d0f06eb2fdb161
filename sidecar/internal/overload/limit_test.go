package overload

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestParseLimit(t *testing.T) {
	for s, want := range map[string]int64{"none": 0, "67108864": 64 << 20, "65536Ki": 64 << 20, "128Mi": 128 << 20, "2Gi": 2 << 30} {
		if got, err := ParseLimit(s); err != nil || got.Bytes != want {
			t.Errorf("ParseLimit(%q) = %d, %v; want %d", s, got.Bytes, err, want)
		}
	}
	for _, s := range []string{"64MB", "-1", "0", "1.5Gi", "Mi", "16Mi", "9999999999Gi", "9223372036854775808", "128 Mi", "128MiMi"} {
		if got, err := ParseLimit(s); err == nil || !strings.Contains(err.Error(), s) {
			t.Errorf("ParseLimit(%q) = %d, %v; want an error that names it", s, got.Bytes, err)
		}
	}
}

// tree makes the files of a machine; a folder is its root.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		file := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// The limit that the kernel holds the process to is the lowest between its
// cgroup and the root of what it can see.
func TestLimitOfTheCgroup(t *testing.T) {
	for name, c := range map[string]struct {
		files  map[string]string
		bytes  int64
		folder string
	}{
		"version 2 in a container": {map[string]string{
			"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "134217728\n",
		}, 128 << 20, "sys/fs/cgroup"},
		"version 2, the pod has less than the container": {map[string]string{
			"proc/self/cgroup": "0::/pod/container\n", "sys/fs/cgroup/pod/container/memory.max": "max\n", "sys/fs/cgroup/pod/memory.max": "67108864\n",
		}, 64 << 20, "sys/fs/cgroup/pod"},
		"version 1, the path is the host's": {map[string]string{
			"proc/self/cgroup": "5:cpu:/a\n4:memory:/kubepods/pod1/c\n0::/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "134217728\n",
		}, 128 << 20, "sys/fs/cgroup/memory"},
		"version 1 without a limit": {map[string]string{
			"proc/self/cgroup": "4:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
		}, 0, ""},
		"no limit":                {map[string]string{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, 0, ""},
		"too little to be meant":  {map[string]string{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "4096\n"}, 0, ""},
		"nonsense in the file":    {map[string]string{"proc/self/cgroup": "what\n\n0::/\n", "sys/fs/cgroup/memory.max": "-"}, 0, ""},
		"a system without cgroup": {nil, 0, ""},
	} {
		root := tree(t, c.files)
		got := cgroupLimit(root)
		want := c.folder
		if want != "" {
			want = filepath.Join(root, want)
		}
		if got.Bytes != c.bytes || got.cgroup != want {
			t.Errorf("%s: %+v; want %d in %q", name, got, c.bytes, want)
		}
	}
}

// What counts is what the kernel charges, less what it can drop by itself, in
// the words of either version; and never less than what Go itself knows of.
func TestSampleOfTheCgroup(t *testing.T) {
	for name, files := range map[string]map[string]string{
		"version 2": {"memory.current": "10000000000\n", "memory.stat": "anon 5\nfile 7\ninactive_file 1000000000\nactive_file 3\n"},
		"version 1": {"memory.usage_in_bytes": "10000000000\n", "memory.stat": "cache 5\ninactive_file 9\ntotal_inactive_file 1000000000\n"},
	} {
		s := newSampler(Limit{Bytes: 1, cgroup: tree(t, files)})
		if got := s.sample(); got.Memory != 9_000_000_000 || got.Goroutines < 1 {
			t.Errorf("%s: %+v; want 9000000000 bytes", name, got)
		}
		s.close()
	}
	s := newSampler(Limit{})
	defer s.close()
	if got := s.sample(); got.Memory < 1<<20 || got.Memory > 16<<30 {
		t.Errorf("without cgroup: %d bytes", got.Memory)
	}
	if n := testing.AllocsPerRun(100, func() { s.sample() }); n > 4 {
		t.Errorf("%v allocations a sample", n)
	}
}

func BenchmarkSample(b *testing.B) {
	s := newSampler(Limit{})
	defer s.close()
	b.ReportAllocs()
	for b.Loop() {
		s.sample()
	}
}

func BenchmarkShed(b *testing.B) {
	m := New(Limit{})
	defer m.close()
	for b.Loop() {
		if m.Shed() {
			b.Fatal("shed")
		}
	}
}
