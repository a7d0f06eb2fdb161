//go:build peers

package fluentd

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestRealForwardServer sends to the forward server that the Fluentd project
// publishes for Node.js, which is no work of ours. It is installed once, below
// .cache/peers.
func TestRealForwardServer(t *testing.T) {
	node, err := exec.LookPath("node")
	if err != nil {
		t.Skip("SKIPPED: no forward server: install node and npm")
	}
	root, err := filepath.Abs("../../../..")
	if err != nil {
		t.Fatal(err)
	}
	cache := filepath.Join(root, ".cache/peers/fluentd")
	install(t, filepath.Join(root, "deploy/peers/fluentd"), cache)

	start := func(args ...string) (address string, lines *bufio.Scanner, stop func()) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), node, append([]string{filepath.Join(cache, "server.js")}, args...)...)
		cmd.Stderr = t.Output()
		stdin, err := cmd.StdinPipe() // the server ends when it is closed
		if err != nil {
			t.Fatal(err)
		}
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines = bufio.NewScanner(stdout)
		lines.Buffer(nil, 4<<20)
		if !lines.Scan() {
			t.Fatalf("the server said nothing: %v", lines.Err())
		}
		var hello struct{ Port int }
		if err := json.Unmarshal(lines.Bytes(), &hello); err != nil {
			t.Fatalf("%s: %v", lines.Text(), err)
		}
		return fmt.Sprint("127.0.0.1:", hello.Port), lines, func() {
			_ = stdin.Close()
			_, _ = io.Copy(io.Discard, stdout)
			if err := cmd.Wait(); err != nil {
				t.Errorf("the server ended badly: %v", err)
			}
		}
	}

	t.Run("acknowledged", func(t *testing.T) {
		address, lines, stop := start()
		defer stop()
		o := newOutput(t, Config{Address: address})
		records := batch(200)
		records[1].Attributes = map[string]any{"n": 1.5, "ok": true, "none": nil, "list": []any{"a", 2.0}, "map": map[string]any{"x": "größe"}}
		began := time.Now()
		if got := o.Write(t.Context(), records); got.Err != nil || len(got.Retry)+len(got.Rejected) > 0 {
			t.Fatalf("%+v", got)
		}
		t.Logf("%d events acknowledged in %s", len(records), time.Since(began))
		for i, r := range records {
			if !lines.Scan() {
				t.Fatalf("event %d of %d never came: %v", i, len(records), lines.Err())
			}
			var e peerEvent
			if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
				t.Fatal(err)
			}
			if e.Tag != "kube.shop.payments_v2" || !time.Unix(e.Seconds, e.Nanos).Equal(r.Time) {
				t.Errorf("event %d: tag %q at %d.%09d; want %s", i, e.Tag, e.Seconds, e.Nanos, r.Time)
			}
			want := map[string]any{}
			data, err := json.Marshal(r.Fields())
			if err != nil {
				t.Fatal(err)
			}
			if err := json.Unmarshal(data, &want); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, e.Record); diff != "" {
				t.Errorf("event %d: %s", i, diff)
			}
		}
	})

	t.Run("forward", func(t *testing.T) {
		key := secretFile(t, "s3cret")
		f := func(name string, args []string, cfg Config) {
			t.Helper()
			address, lines, stop := start(args...)
			defer stop()
			cfg.Address, cfg.MaxChunkBytes = address, 64<<10
			o := newForwardOutput(t, cfg)
			records := plain(2000)
			records[1].Attributes = map[string]any{"n": 1.5, "i": 402.0, "ok": true, "none": nil, "list": []any{"a", 2.0}, "map": map[string]any{"x": "größe"}}
			began := time.Now()
			if got := write(t, o, records); !clean(got) {
				t.Fatalf("%s: %+v", name, got)
			}
			t.Logf("%s: %d events acknowledged in %s", name, len(records), time.Since(began))
			for i, r := range records {
				if !lines.Scan() {
					t.Fatalf("%s: event %d of %d never came: %v", name, i, len(records), lines.Err())
				}
				var e peerEvent
				if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
					t.Fatal(err)
				}
				if e.Tag != "kube.shop.payments" || !time.Unix(e.Seconds, e.Nanos).Equal(r.Time) {
					t.Errorf("%s: event %d: tag %q at %d.%09d; want %s", name, i, e.Tag, e.Seconds, e.Nanos, r.Time)
				}
				if diff := cmp.Diff(jsonOf(t, r.Fields()), e.Record); diff != "" {
					t.Errorf("%s: event %d: %s", name, i, diff)
				}
			}
		}
		f("plain", nil, Config{})
		f("gzip", nil, Config{Compression: "gzip"})
		f("shared key", []string{"--shared-key", "s3cret"}, Config{SharedKeyFile: key})
		f("user, gzip", []string{"--shared-key", "s3cret", "--user", "node", "--password", "pw"}, Config{Compression: "gzip", SharedKeyFile: key, Username: "node", PasswordFile: secretFile(t, "pw")})

		address, lines, stop := start("--shared-key", "s3cret", "--user", "node", "--password", "pw")
		refused := func(name string, cfg Config, want string) {
			t.Helper()
			cfg.Address = address
			if got := write(t, newForwardOutput(t, cfg), batch(1)); got.Err == nil || !strings.Contains(got.Err.Error(), want) {
				t.Errorf("%s: %+v; want %q", name, got, want)
			} else {
				t.Logf("%s: permanent %t: %v", name, got.Permanent, got.Err)
			}
		}
		refused("wrong key", Config{SharedKeyFile: secretFile(t, "x"), Username: "node", PasswordFile: secretFile(t, "pw")}, "sharedKeyFile")
		refused("wrong password", Config{SharedKeyFile: key, Username: "node", PasswordFile: secretFile(t, "x")}, "passwordFile")
		refused("no user", Config{SharedKeyFile: key}, "username")
		refused("no key", Config{}, "sharedKeyFile")
		stop()
		if lines.Scan() {
			t.Errorf("an event came through: %s", lines.Text())
		}
	})

	t.Run("server with a shared key", func(t *testing.T) {
		address, _, stop := start("--shared-key", "secret")
		defer stop()
		o := newOutput(t, Config{Address: address, AckTimeout: 2 * time.Second})
		if got := o.Write(t.Context(), batch(1)); got.Err == nil || !strings.Contains(got.Err.Error(), "shared key") {
			t.Errorf("%+v; want an error that names the shared key", got)
		}
	})

	t.Run("server goes away and comes back", func(t *testing.T) {
		address, _, stop := start()
		o := newOutput(t, Config{Address: address, AckTimeout: 2 * time.Second})
		if got := o.Write(t.Context(), batch(1)); got.Err != nil {
			t.Fatal(got.Err)
		}
		stop()
		if got := o.Write(t.Context(), batch(2)); got.Err == nil {
			t.Errorf("%+v; want an error, the server is gone", got)
		}
		_, lines, stop := start("--port", address[strings.LastIndexByte(address, ':')+1:])
		defer stop()
		if got := o.Write(t.Context(), batch(2)); got.Err != nil {
			t.Errorf("after the server has come back: %v", got.Err)
		}
		if !lines.Scan() || !strings.Contains(lines.Text(), "line 0") {
			t.Errorf("the server received %q", lines.Text())
		}
	})
}

type peerEvent struct {
	Tag     string
	Seconds int64
	Nanos   int64
	Record  map[string]any
}

// install brings the server and its package into the cache, by npm where they
// are not there yet.
func install(t *testing.T, from, cache string) {
	t.Helper()
	if err := os.MkdirAll(cache, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"package.json", "server.js"} {
		data, err := os.ReadFile(filepath.Join(from, name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(cache, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(filepath.Join(cache, "node_modules/@fluent-org/logger")); err == nil {
		return
	}
	npm, err := exec.LookPath("npm")
	if err != nil {
		t.Skip("SKIPPED: no forward server: install npm")
	}
	out, err := exec.CommandContext(t.Context(), npm, "install", "--prefix", cache, "--no-audit", "--no-fund").CombinedOutput()
	if err != nil {
		t.Skipf("SKIPPED: no forward server: npm install: %v\n%s", err, out)
	}
}
