package config_test

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/outrigger-mesh/outrigger/collector/internal/config"
	"github.com/outrigger-mesh/outrigger/golden"
)

func TestParse(t *testing.T) {
	c, err := config.Parse([]byte(`
cluster: eu-1
logs: {outputs: [local], batch: {linger: 50ms}}
metrics: {host: true, expose: 0.0.0.0:15031, scrape: [{job: sidecars, address: 127.0.0.1:15020, interval: 5s}]}
outputs: {local: {store: {folder: /data, retention: 48h}}, spare: {influxdb: {url: http://i:8086, bucket: b}}}
`), none)
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
	golden.Cases(t, "testdata/*.txtar", func(_ *testing.T, c *golden.Case) {
		_, err := config.Parse([]byte(c.Input("config.yaml")), none)
		got := "no error\n"
		if err != nil {
			got = err.Error() + "\n"
		}
		c.Want("errors", got)
	})
}

func TestTooLarge(t *testing.T) {
	if _, err := config.Parse([]byte(strings.Repeat("#", config.MaxSize+1)), none); err == nil {
		t.Error("a file over the limit is read")
	}
}

// Whatever the bytes: no panic.
func FuzzParse(f *testing.F) {
	f.Add([]byte("logs: {outputs: [a]}\noutputs: {a: {store: {folder: /x}}}\n"))
	f.Add([]byte("a: &a [*a]\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := config.Parse(b, none); err == nil && c.Logs == nil && c.Metrics == nil {
			t.Fatal("an empty configuration was taken")
		}
	})
}

// none is an environment in which nothing is set.
func none(string) string { return "" }
