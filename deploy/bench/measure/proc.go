package measure

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"time"
)

// tick is what /proc counts CPU time in: USER_HZ is 100 on every Linux that Go
// runs on.
const tick = 10 * time.Millisecond

// StatCPU reads the CPU time of a process (utime and stime) from the text of
// /proc/<pid>/stat, exact to 10 ms. See proc(5).
func StatCPU(stat []byte) (time.Duration, error) {
	// The second field is the name in parentheses, which may hold anything.
	i := bytes.LastIndexByte(stat, ')')
	if i < 0 {
		return 0, errors.New("stat has no name in parentheses")
	}
	fields := bytes.Fields(stat[i+1:])
	const utime, stime = 11, 12 // fields 14 and 15 of the line
	if len(fields) <= stime {
		return 0, fmt.Errorf("stat has %d fields after the name, want more than %d", len(fields), stime)
	}
	var sum uint64
	for _, f := range fields[utime : stime+1] {
		n, err := strconv.ParseUint(string(f), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("stat: %w", err)
		}
		sum += n
	}
	return time.Duration(sum) * tick, nil
}

// Status is what the text of /proc/<pid>/status, or that of one of its threads,
// says.
type Status struct {
	ResidentKB  int    // VmRSS
	Voluntary   uint64 // context switches of this thread, because it waited
	Involuntary uint64 // because another was let run
}

// ParseStatus reads the fields that it finds; a thread that has ended has none.
func ParseStatus(text []byte) (Status, error) {
	var s Status
	for line := range bytes.Lines(text) {
		key, value, _ := bytes.Cut(line, []byte(":"))
		fields := bytes.Fields(value)
		if len(fields) == 0 {
			continue
		}
		var err error
		switch string(key) {
		case "VmRSS":
			s.ResidentKB, err = strconv.Atoi(string(fields[0]))
		case "voluntary_ctxt_switches":
			s.Voluntary, err = strconv.ParseUint(string(fields[0]), 10, 64)
		case "nonvoluntary_ctxt_switches":
			s.Involuntary, err = strconv.ParseUint(string(fields[0]), 10, 64)
		default:
		}
		if err != nil {
			return s, fmt.Errorf("status: %s: %w", key, err)
		}
	}
	return s, nil
}

// Busy reads from the text of /proc/stat how long the processors that are meant
// have done anything, or were taken away by the machine that this one runs on;
// exact to 10 ms each.
func Busy(stat []byte, meant func(cpu int) bool) (time.Duration, error) {
	var ticks uint64
	found := false
	for line := range bytes.Lines(stat) {
		fields := bytes.Fields(line)
		if len(fields) < 9 || !bytes.HasPrefix(fields[0], []byte("cpu")) || len(fields[0]) == len("cpu") {
			continue
		}
		cpu, err := strconv.Atoi(string(fields[0][len("cpu"):]))
		if err != nil {
			return 0, fmt.Errorf("stat: %w", err)
		}
		if !meant(cpu) {
			continue
		}
		found = true
		for i, f := range fields[1:9] {
			const idle, iowait = 3, 4
			if i == idle || i == iowait {
				continue
			}
			n, err := strconv.ParseUint(string(f), 10, 64)
			if err != nil {
				return 0, fmt.Errorf("stat: %w", err)
			}
			ticks += n
		}
	}
	if !found {
		return 0, errors.New("stat has no line for the processors that are meant")
	}
	return time.Duration(ticks) * tick, nil
}
