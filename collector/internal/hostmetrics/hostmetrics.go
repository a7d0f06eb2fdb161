// Package hostmetrics reads the basics of the node from procfs: CPU, memory,
// load, disks, network and pressure stall.
//
// It knows the kernel's files (through prometheus/procfs) and node_exporter's
// metric names, so that existing dashboards and alerts work. It does not know
// who reads the metrics, and keeps nothing but the last CPU times. It is a
// [prometheus.Collector]: the collector's main registers it, and the files are
// read when the registry is gathered.
//
// A file that is missing or unreadable spoils only its own metrics: they are
// left out and outrigger_host_read_errors_total counts it. Kernels built or
// booted without pressure stall information therefore count a pressure error at
// every gathering, and that is all.
package hostmetrics

import (
	"fmt"
	"log/slog"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/procfs"
	"github.com/prometheus/procfs/blockdevice"
)

// sectorSize of /proc/diskstats, whatever the device's own (Documentation/admin-guide/iostats.rst).
const sectorSize = 512

// idleJump is how many seconds idle time may run backwards before the CPU is
// taken for a new one (hot-plugged) rather than for the kernel's jitter.
const idleJump = 3.0

// The values of outrigger_host_read_errors_total's label source.
const (
	sourceCPU      = "cpu"
	sourceMemory   = "memory"
	sourceLoad     = "load"
	sourceDisk     = "disk"
	sourceNetwork  = "network"
	sourcePressure = "pressure"
)

// Collector is a [prometheus.Collector]; safe for concurrent use.
type Collector struct {
	proc string
	log  *slog.Logger

	errors *prometheus.CounterVec
	descs  map[string]*prometheus.Desc

	mu     sync.Mutex
	cpu    map[int64]procfs.CPUStat // never runs backwards
	failed map[string]bool          // sources whose failure has been logged
}

// New returns a Collector of the host whose file system is mounted at root: "/"
// outside a container, for example "/host" inside one (root/proc is read).
func New(root string, log *slog.Logger) *Collector {
	c := &Collector{
		proc: filepath.Join(root, "proc"),
		log:  log,
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "outrigger_host_read_errors_total",
			Help: "Times a source of host metrics could not be read: cpu, memory, load, disk, network, pressure.",
		}, []string{"source"}),
		descs:  map[string]*prometheus.Desc{},
		cpu:    map[int64]procfs.CPUStat{},
		failed: map[string]bool{},
	}
	for _, s := range []string{sourceCPU, sourceMemory, sourceLoad, sourceDisk, sourceNetwork, sourcePressure} {
		c.errors.WithLabelValues(s)
	}
	add := func(name, help string, labels ...string) {
		c.descs[name] = prometheus.NewDesc(name, help, labels, nil)
	}
	add("node_cpu_seconds_total", "Seconds the CPUs spent in each mode.", "cpu", "mode")
	add("node_cpu_guest_seconds_total", "Seconds the CPUs spent in guests (VMs) for each mode.", "cpu", "mode")
	add("node_boot_time_seconds", "Node boot time, in unixtime.")
	add("node_context_switches_total", "Total number of context switches.")
	add("node_forks_total", "Total number of forks.")
	add("node_procs_running", "Number of processes in runnable state.")
	add("node_procs_blocked", "Number of processes blocked waiting for I/O to complete.")
	for _, m := range memory(procfs.Meminfo{}) {
		add(m.name, "Memory information field "+strings.TrimSuffix(strings.TrimPrefix(m.name, "node_memory_"), "_bytes")+" of /proc/meminfo.")
	}
	add("node_load1", "1m load average.")
	add("node_load5", "5m load average.")
	add("node_load15", "15m load average.")
	for _, m := range disk(blockdevice.IOStats{}) {
		add(m.name, m.help, "device")
	}
	for _, m := range network(procfs.NetDevLine{}) {
		add(m.name, m.help, "device")
	}
	for _, m := range pressures() {
		add(m.some, "Seconds in which some tasks waited for "+m.resource+".")
		if m.full != "" {
			add(m.full, "Seconds in which no task could run because all waited for "+m.resource+".")
		}
	}
	return c
}

// Describe sends every description the Collector can ever use.
func (c *Collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range c.descs {
		ch <- d
	}
	c.errors.Describe(ch)
}

// Collect reads the files. It never fails and never sends an invalid metric.
func (c *Collector) Collect(ch chan<- prometheus.Metric) {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := sink{ch, c.descs}
	for _, s := range []struct {
		name string
		read func(sink) error
	}{
		{sourceCPU, c.collectCPU},
		{sourceMemory, c.collectMemory},
		{sourceLoad, c.collectLoad},
		{sourceDisk, c.collectDisk},
		{sourceNetwork, c.collectNetwork},
		{sourcePressure, c.collectPressure},
	} {
		err := s.read(out)
		if err != nil {
			c.errors.WithLabelValues(s.name).Inc()
			if !c.failed[s.name] {
				c.log.Warn("host metrics cannot be read; mount the host's /proc, or ignore this where the kernel does not have them",
					"outrigger.source", s.name, "error.message", err.Error())
			}
		}
		c.failed[s.name] = err != nil
	}
	c.errors.Collect(ch)
}

type sink struct {
	ch    chan<- prometheus.Metric
	descs map[string]*prometheus.Desc
}

func (s sink) counter(name string, v float64, labels ...string) {
	s.ch <- prometheus.MustNewConstMetric(s.descs[name], prometheus.CounterValue, v, labels...)
}

func (s sink) gauge(name string, v float64) {
	s.ch <- prometheus.MustNewConstMetric(s.descs[name], prometheus.GaugeValue, v)
}

func (c *Collector) fs() (procfs.FS, error) { return procfs.NewFS(c.proc) }

func (c *Collector) collectCPU(out sink) error {
	fs, err := c.fs()
	if err != nil {
		return err
	}
	st, err := fs.Stat()
	if err != nil {
		return err
	}
	for id, now := range st.CPU {
		now = forward(c.cpu[id], now)
		c.cpu[id] = now
		cpu := strconv.FormatInt(id, 10)
		for _, m := range []struct {
			mode string
			v    float64
		}{
			{"user", now.User},
			{"nice", now.Nice},
			{"system", now.System},
			{"idle", now.Idle},
			{"iowait", now.Iowait},
			{"irq", now.IRQ},
			{"softirq", now.SoftIRQ},
			{"steal", now.Steal},
		} {
			out.counter("node_cpu_seconds_total", m.v, cpu, m.mode)
		}
		out.counter("node_cpu_guest_seconds_total", now.Guest, cpu, "user")
		out.counter("node_cpu_guest_seconds_total", now.GuestNice, cpu, "nice")
	}
	for id := range c.cpu {
		if _, there := st.CPU[id]; !there {
			delete(c.cpu, id)
		}
	}
	out.gauge("node_boot_time_seconds", float64(st.BootTime))
	out.counter("node_context_switches_total", float64(st.ContextSwitches))
	out.counter("node_forks_total", float64(st.ProcessCreated))
	out.gauge("node_procs_running", float64(st.ProcessesRunning))
	out.gauge("node_procs_blocked", float64(st.ProcessesBlocked))
	return nil
}

// forward keeps a CPU's times from running backwards by the kernel's rounding
// (iowait does), which a reader of a counter would take for a restart and a
// huge increase. A CPU that came back anew starts again.
func forward(last, now procfs.CPUStat) procfs.CPUStat {
	if last.Idle-now.Idle >= idleJump {
		return now
	}
	return procfs.CPUStat{
		User: max(last.User, now.User), Nice: max(last.Nice, now.Nice), System: max(last.System, now.System),
		Idle: max(last.Idle, now.Idle), Iowait: max(last.Iowait, now.Iowait), IRQ: max(last.IRQ, now.IRQ),
		SoftIRQ: max(last.SoftIRQ, now.SoftIRQ), Steal: max(last.Steal, now.Steal),
		Guest: max(last.Guest, now.Guest), GuestNice: max(last.GuestNice, now.GuestNice),
	}
}

type memoryField struct {
	name  string
	bytes *uint64
}

func memory(m procfs.Meminfo) []memoryField {
	return []memoryField{
		{"node_memory_MemTotal_bytes", m.MemTotalBytes},
		{"node_memory_MemFree_bytes", m.MemFreeBytes},
		{"node_memory_MemAvailable_bytes", m.MemAvailableBytes},
		{"node_memory_Buffers_bytes", m.BuffersBytes},
		{"node_memory_Cached_bytes", m.CachedBytes},
		{"node_memory_SwapCached_bytes", m.SwapCachedBytes},
		{"node_memory_Active_bytes", m.ActiveBytes},
		{"node_memory_Inactive_bytes", m.InactiveBytes},
		{"node_memory_SwapTotal_bytes", m.SwapTotalBytes},
		{"node_memory_SwapFree_bytes", m.SwapFreeBytes},
		{"node_memory_Dirty_bytes", m.DirtyBytes},
		{"node_memory_Writeback_bytes", m.WritebackBytes},
		{"node_memory_AnonPages_bytes", m.AnonPagesBytes},
		{"node_memory_Mapped_bytes", m.MappedBytes},
		{"node_memory_Shmem_bytes", m.ShmemBytes},
		{"node_memory_Slab_bytes", m.SlabBytes},
		{"node_memory_SReclaimable_bytes", m.SReclaimableBytes},
		{"node_memory_SUnreclaim_bytes", m.SUnreclaimBytes},
		{"node_memory_PageTables_bytes", m.PageTablesBytes},
		{"node_memory_CommitLimit_bytes", m.CommitLimitBytes},
		{"node_memory_Committed_AS_bytes", m.CommittedASBytes},
	}
}

func (c *Collector) collectMemory(out sink) error {
	fs, err := c.fs()
	if err != nil {
		return err
	}
	m, err := fs.Meminfo()
	if err != nil {
		return err
	}
	for _, f := range memory(m) {
		if f.bytes != nil {
			out.gauge(f.name, float64(*f.bytes))
		}
	}
	return nil
}

func (c *Collector) collectLoad(out sink) error {
	fs, err := c.fs()
	if err != nil {
		return err
	}
	l, err := fs.LoadAvg()
	if err != nil {
		return err
	}
	out.gauge("node_load1", l.Load1)
	out.gauge("node_load5", l.Load5)
	out.gauge("node_load15", l.Load15)
	return nil
}

type deviceMetric struct {
	name, help string
	value      float64
}

func disk(s blockdevice.IOStats) []deviceMetric {
	return []deviceMetric{
		{"node_disk_reads_completed_total", "The total number of reads completed successfully.", float64(s.ReadIOs)},
		{"node_disk_read_bytes_total", "The total number of bytes read successfully.", float64(s.ReadSectors) * sectorSize},
		{"node_disk_read_time_seconds_total", "The total number of seconds spent by all reads.", float64(s.ReadTicks) / 1000},
		{"node_disk_writes_completed_total", "The total number of writes completed successfully.", float64(s.WriteIOs)},
		{"node_disk_written_bytes_total", "The total number of bytes written successfully.", float64(s.WriteSectors) * sectorSize},
		{"node_disk_write_time_seconds_total", "The total number of seconds spent by all writes.", float64(s.WriteTicks) / 1000},
		{"node_disk_io_time_seconds_total", "Total seconds spent doing I/Os.", float64(s.IOsTotalTicks) / 1000},
	}
}

func (c *Collector) collectDisk(out sink) error {
	// Only proc is read; the library wants a sys that exists.
	fs, err := blockdevice.NewFS(c.proc, c.proc)
	if err != nil {
		return err
	}
	all, err := fs.ProcDiskstats()
	if err != nil {
		return err
	}
	for _, d := range all {
		if !wholeDisk(d.DeviceName) {
			continue
		}
		for _, m := range disk(d.IOStats) {
			out.counter(m.name, m.value, d.DeviceName)
		}
	}
	return nil
}

// wholeDisk leaves out partitions, whose bytes their disk counts already, and
// devices that are memory or files.
func wholeDisk(name string) bool {
	stem := strings.TrimRight(name, "0123456789")
	numbered := stem != name
	switch {
	case !numbered:
		return true
	case stem == "ram", stem == "zram", stem == "loop", stem == "fd":
		return false
	case strings.HasPrefix(name, "nvme"), strings.HasPrefix(name, "mmcblk"):
		return !strings.HasSuffix(stem, "p") // nvme0n1p2, mmcblk0p1
	case strings.HasPrefix(stem, "sd"), strings.HasPrefix(stem, "hd"), strings.HasPrefix(stem, "vd"), strings.HasPrefix(stem, "xvd"):
		return false // sda1; a whole one ends in a letter
	default:
		return true
	}
}

func network(l procfs.NetDevLine) []deviceMetric {
	return []deviceMetric{
		{"node_network_receive_bytes_total", "Network device statistic receive_bytes.", float64(l.RxBytes)},
		{"node_network_receive_packets_total", "Network device statistic receive_packets.", float64(l.RxPackets)},
		{"node_network_receive_errs_total", "Network device statistic receive_errs.", float64(l.RxErrors)},
		{"node_network_receive_drop_total", "Network device statistic receive_drop.", float64(l.RxDropped)},
		{"node_network_transmit_bytes_total", "Network device statistic transmit_bytes.", float64(l.TxBytes)},
		{"node_network_transmit_packets_total", "Network device statistic transmit_packets.", float64(l.TxPackets)},
		{"node_network_transmit_errs_total", "Network device statistic transmit_errs.", float64(l.TxErrors)},
		{"node_network_transmit_drop_total", "Network device statistic transmit_drop.", float64(l.TxDropped)},
	}
}

// collectNetwork reads the interfaces of process 1: /proc/net is that of the
// reading process, which in a container is the pod's and not the node's.
func (c *Collector) collectNetwork(out sink) error {
	fs, err := c.fs()
	if err != nil {
		return err
	}
	init, err := fs.Proc(1)
	if err != nil {
		return err
	}
	devices, err := init.NetDev()
	if err != nil {
		return err
	}
	for _, d := range devices {
		for _, m := range network(d) {
			out.counter(m.name, m.value, d.Name)
		}
	}
	return nil
}

type pressure struct{ resource, some, full string }

func pressures() []pressure {
	return []pressure{
		// All tasks of a machine cannot wait for CPU: "full" says nothing there.
		{"cpu", "node_pressure_cpu_waiting_seconds_total", ""},
		{"io", "node_pressure_io_waiting_seconds_total", "node_pressure_io_stalled_seconds_total"},
		{"memory", "node_pressure_memory_waiting_seconds_total", "node_pressure_memory_stalled_seconds_total"},
	}
}

func (c *Collector) collectPressure(out sink) error {
	fs, err := c.fs()
	if err != nil {
		return err
	}
	for _, p := range pressures() {
		s, err := fs.PSIStatsForResource(p.resource)
		if err != nil {
			return fmt.Errorf("pressure of %s: %w", p.resource, err)
		}
		if s.Some != nil {
			out.counter(p.some, float64(s.Some.Total)/1e6)
		}
		if s.Full != nil && p.full != "" {
			out.counter(p.full, float64(s.Full.Total)/1e6)
		}
	}
	return nil
}
