package overload

import (
	"bytes"
	"os"
	"path/filepath"
	"runtime/metrics"
	"strconv"
)

// sampler reads what the process uses. It is for one goroutine.
type sampler struct {
	runtime []metrics.Sample
	// Of the cgroup whose limit is in force: what it is charged for, and the part
	// of it that the kernel can drop. Else of the process.
	charged, stat, statm *os.File
	droppable            []byte
	page                 int64
	buffer               []byte
}

func newSampler(limit Limit) *sampler {
	s := &sampler{
		runtime: []metrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}, {Name: "/sched/goroutines:goroutines"}},
		page:    int64(os.Getpagesize()), buffer: make([]byte, 16<<10),
	}
	// What cannot be opened is not there on this system; Go's own account remains.
	open := func(folder, name string) *os.File {
		f, err := os.Open(filepath.Join(folder, name))
		if err != nil {
			return nil
		}
		return f
	}
	if limit.cgroup != "" {
		if s.charged = open(limit.cgroup, "memory.current"); s.charged != nil {
			s.droppable = []byte("\ninactive_file ")
		} else {
			s.charged, s.droppable = open(limit.cgroup, "memory.usage_in_bytes"), []byte("\ntotal_inactive_file ")
		}
		s.stat = open(limit.cgroup, "memory.stat")
	}
	s.statm = open("/proc/self", "statm")
	return s
}

func (s *sampler) close() {
	for _, f := range []*os.File{s.charged, s.stat, s.statm} {
		if f != nil {
			_ = f.Close()
		}
	}
}

// sample takes the largest of what can be read: Go's own account, which does not
// know sockets; the anonymous memory of the process, which does not know other
// processes of its container; and what its cgroup is charged for without the
// cache of files that nobody reads.
func (s *sampler) sample() Usage {
	metrics.Read(s.runtime)
	u := Usage{
		Memory:     int64(s.runtime[0].Value.Uint64() - s.runtime[1].Value.Uint64()),
		Goroutines: int(s.runtime[2].Value.Uint64()),
	}
	if f := bytes.Fields(s.read(s.statm)); len(f) > 2 { // proc_pid_statm(5): size resident shared
		u.Memory = max(u.Memory, (number(f[1])-number(f[2]))*s.page)
	}
	if charged := number(s.read(s.charged)); charged > 0 {
		if _, after, ok := bytes.Cut(s.read(s.stat), s.droppable); ok {
			charged -= number(after)
		}
		u.Memory = max(u.Memory, charged)
	}
	return u
}

// read returns the file as it is now, valid until the next read; nothing where it
// cannot be read.
func (s *sampler) read(f *os.File) []byte {
	if f == nil {
		return nil
	}
	n, _ := f.ReadAt(s.buffer, 0) // io.EOF says that all of it fits
	return s.buffer[:n]
}

// number reads the digits at the beginning; 0 where there are none.
func number(b []byte) int64 {
	end := 0
	for end < len(b) && '0' <= b[end] && b[end] <= '9' {
		end++
	}
	n, err := strconv.ParseInt(string(b[:end]), 10, 64)
	if err != nil {
		return 0
	}
	return n
}
