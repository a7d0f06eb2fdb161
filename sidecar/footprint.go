package main

import (
	"bytes"
	"fmt"
	"os"
	"runtime/debug"
	"syscall"
)

// giveBack returns to the system what start-up took and a sidecar that idles for
// months does not need: free heap, and the pages of the program itself, most of
// which hold descriptions of messages that were registered and will not be looked
// at again. What is needed after all comes back from the page cache, a fault a
// page. It never fails: what cannot be given back stays.
func giveBack() {
	debug.FreeOSMemory()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return
	}
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return
	}
	for line := range bytes.Lines(maps) {
		if from, to, ok := unwritten(string(line), self); ok {
			// The kernel takes it as a hint that these pages can be read again.
			_, _, _ = syscall.Syscall(syscall.SYS_MADVISE, from, to-from, syscall.MADV_DONTNEED)
		}
	}
}

// unwritten reads a line of /proc/self/maps, and is ok for a part of the program
// file that nothing can have written to. A program that is loaded anywhere has
// relocations in pages that look like these, and is left alone.
func unwritten(line, self string) (from, to uintptr, ok bool) {
	const highest = 1 << 32
	var mode, offset, device, path string
	var inode uint64
	if n, err := fmt.Sscanf(line, "%x-%x %s %s %s %d %s", &from, &to, &mode, &offset, &device, &inode, &path); n != 7 || err != nil {
		return 0, 0, false
	}
	return from, to, path == self && (mode == "r-xp" || mode == "r--p") && to < highest
}
