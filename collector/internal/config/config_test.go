package config_test

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"

	"github.com/outrigger-mesh/outrigger/collector/internal/config"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func TestParse(t *testing.T) {
	c, err := config.Parse([]byte(`
cluster: eu-1
logs: {outputs: [local], batch: {linger: 50ms}}
metrics: {host: true, expose: 0.0.0.0:15031, scrape: [{job: sidecars, address: 127.0.0.1:15020, interval: 5s}]}
outputs: {local: {store: {folder: /data, retention: 48h}}, spare: {influxdb: {url: http://i:8086, bucket: b}}}
`))
	if err != nil {
		t.Fatal(err)
	}
	if c.Admin != config.DefaultAdmin || c.DataDir != config.DefaultDataDir || c.Logs.Folder != config.DefaultFolder || c.Metrics.HostRoot != "/" {
		t.Errorf("defaults: %+v", c)
	}
	if c.Logs.Batch.Linger != 50*time.Millisecond || c.Outputs["local"].Store.Retention != 48*time.Hour || c.Metrics.Scrape[0].Interval != 5*time.Second {
		t.Errorf("durations: %+v", c)
	}
	if d := cmp.Diff([]string{"spare"}, c.Unused()); d != "" {
		t.Errorf("Unused (-want +got):\n%s", d)
	}
}

// Each file of testdata is a configuration with mistakes and what is said of
// them.
func TestMistakes(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no golden files: %v", err)
	}
	for _, path := range files {
		t.Run(filepath.Base(path), func(t *testing.T) {
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			a := txtar.Parse(b)
			_, err = config.Parse(a.Files[0].Data)
			got := "no error\n"
			if err != nil {
				got = err.Error() + "\n"
			}
			if *update {
				a.Files[1].Data = []byte(got)
				if err := os.WriteFile(path, txtar.Format(a), 0o600); err != nil {
					t.Fatal(err)
				}
				return
			}
			if d := cmp.Diff(string(a.Files[1].Data), got); d != "" {
				t.Errorf("errors (-want +got):\n%s", d)
			}
		})
	}
}

func TestTooLarge(t *testing.T) {
	if _, err := config.Parse([]byte(strings.Repeat("#", config.MaxSize+1))); err == nil {
		t.Error("a file over the limit is read")
	}
}

// Whatever the bytes: no panic.
func FuzzParse(f *testing.F) {
	f.Add([]byte("logs: {outputs: [a]}\noutputs: {a: {store: {folder: /x}}}\n"))
	f.Add([]byte("a: &a [*a]\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := config.Parse(b); err == nil && c.Logs == nil && c.Metrics == nil {
			t.Fatal("an empty configuration was taken")
		}
	})
}
