package overload

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"testing"
	"time"
)

const (
	childEnv   = "OVERLOAD_TEST_CHILD" // says to TestMain that it is the child
	childLimit = 256 << 20
)

// told is what the child says of itself.
type told struct {
	Served, Shed int
	Peak         int64 // bytes
	Recovered    bool
}

// A process that is asked for four times the memory that it may have sheds, stays
// below its limit, and serves again when what it served has ended.
func TestProcessSurvivesMoreThanItCanHold(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"=1")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, stderr.Bytes())
	}
	var got told
	if err := json.Unmarshal(out, &got); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Logf("%+v", got)
	if got.Served == 0 || got.Shed == 0 || got.Peak >= childLimit || got.Peak < childLimit/2 || !got.Recovered {
		t.Errorf("%+v; want some served, some shed, at most %d bytes, and OK at the end", got, childLimit)
	}
}

// child serves requests that each hold 128 KiB, for 1 GiB together or until a
// thousand have been shed.
func child() {
	m := New(Limit{Bytes: childLimit})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = m.Run(ctx) })
	own := newSampler(Limit{})
	defer own.close()
	var got told
	var held [][]byte
	for i := 0; i < 8192 && got.Shed < 1000; i++ {
		if m.Shed() {
			got.Shed++
		} else {
			b := make([]byte, 128<<10)
			for page := 0; page < len(b); page += 4096 {
				b[page] = 1
			}
			held = append(held, b)
			got.Served++
			got.Peak = max(got.Peak, own.sample().Memory)
		}
		time.Sleep(300 * time.Microsecond)
	}
	runtime.KeepAlive(held)
	for until := time.Now().Add(10 * time.Second); !got.Recovered && time.Now().Before(until); time.Sleep(10 * time.Millisecond) {
		got.Recovered = m.State() == OK
	}
	cancel()
	wg.Wait()
	if err := json.NewEncoder(os.Stdout).Encode(got); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
