package hostmetrics

import (
	"log/slog"
	"os"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/procfs"

	"github.com/outrigger-mesh/outrigger/golden"
)

// gather goes through a pedantic registry, which refuses what Describe did not announce.
func gather(t *testing.T, root string) string {
	t.Helper()
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(New(root, slog.New(slog.DiscardHandler)))
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(&b, f); err != nil {
			t.Fatal(err)
		}
	}
	return b.String()
}

// testdata/node is a whole host; testdata/partial has a load, a damaged stat
// and nothing else; testdata/none does not exist. None of them fails.
func TestGolden(t *testing.T) {
	for _, host := range []string{"node", "partial", "none"} {
		t.Run(host, func(t *testing.T) {
			golden.File(t, "testdata/"+host+".metrics", gather(t, "testdata/"+host))
		})
	}
}

func TestThisHost(t *testing.T) {
	if _, err := os.Stat("/proc/stat"); err != nil {
		t.Skip("no procfs here: ", err)
	}
	got := gather(t, "/")
	for _, name := range []string{"node_cpu_seconds_total{", "node_memory_MemTotal_bytes ", "node_load1 ", "node_network_receive_bytes_total{"} {
		if !strings.Contains(got, "\n"+name) {
			t.Errorf("this host has no %s", name)
		}
	}
}

func TestCPUNeverRunsBackwards(t *testing.T) {
	f := func(last, now, want procfs.CPUStat) {
		t.Helper()
		if got := forward(last, now); got != want {
			t.Errorf("forward(%v, %v) = %v, want %v", last, now, got, want)
		}
	}
	f(procfs.CPUStat{Idle: 10, Iowait: 5}, procfs.CPUStat{Idle: 11, Iowait: 4.9}, procfs.CPUStat{Idle: 11, Iowait: 5})
	f(procfs.CPUStat{Idle: 10, User: 1}, procfs.CPUStat{Idle: 9.9, User: 2}, procfs.CPUStat{Idle: 10, User: 2})
	f(procfs.CPUStat{Idle: 1000, User: 50}, procfs.CPUStat{Idle: 1, User: 2}, procfs.CPUStat{Idle: 1, User: 2}) // plugged in anew
}

func TestWholeDisk(t *testing.T) {
	f := func(name string, want bool) {
		t.Helper()
		if got := wholeDisk(name); got != want {
			t.Errorf("wholeDisk(%q) = %v, want %v", name, got, want)
		}
	}
	f("sda", true)
	f("sda1", false)
	f("sdaa", true)
	f("sdaa2", false)
	f("vdb", true)
	f("vdb12", false)
	f("xvda1", false)
	f("nvme0n1", true)
	f("nvme0n1p2", false)
	f("mmcblk0", true)
	f("mmcblk0p1", false)
	f("dm-0", true)
	f("md127", true)
	f("loop7", false)
	f("zram0", false)
	f("sr0", true)
}
