package program_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/program"
)

func parse(args ...string) (string, error) {
	var f program.Flags
	fs := flag.NewFlagSet("sidecar", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	f.Register(fs)
	var out bytes.Buffer
	err := f.Parse(fs, args, &out)
	return out.String(), err
}

func TestFlags(t *testing.T) {
	if out, err := parse("--version"); !errors.Is(err, flag.ErrHelp) || !strings.HasPrefix(out, "sidecar ") {
		t.Errorf("--version: %q, %v", out, err)
	}
	for args, want := range map[string]string{"serve": `"serve"`, "--log-format=xml": `"xml"`, "--log-level=loud": "loud"} {
		if _, err := parse(args); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v; want it to name %s", args, err, want)
		}
	}
}

func TestLogLinesAreECS(t *testing.T) {
	var f program.Flags
	fs := flag.NewFlagSet("x", flag.ContinueOnError)
	f.Register(fs)
	var out bytes.Buffer
	f.Log("collector", &out).Warn("disk full")
	for _, want := range []string{`"log.level":"warn"`, `"message":"disk full"`, `"service.name":"collector"`, `"@timestamp"`} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%s is missing in %s", want, &out)
		}
	}
}

func TestAPortInUseIsNamedWithItsFlag(t *testing.T) {
	l, err := program.Listen(t.Context(), "--admin-address", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	_, err = program.Listen(t.Context(), "--admin-address", l.Addr().String())
	if err == nil || !strings.Contains(err.Error(), "--admin-address "+l.Addr().String()) || !strings.Contains(err.Error(), "another port") {
		t.Errorf("err = %v", err)
	}
}

func TestOnlyLoopback(t *testing.T) {
	for _, address := range []string{"0.0.0.0:0", "192.0.2.1:80", ":0"} {
		if _, err := program.ListenLoopback(t.Context(), "--xds-address", address); !errors.Is(err, program.ErrNotLoopback) {
			t.Errorf("%s: %v", address, err)
		}
	}
	l, err := program.ListenLoopback(t.Context(), "--xds-address", "[::1]:0")
	if err == nil {
		_ = l.Close()
	}
}

func TestServeEndsInOrder(t *testing.T) {
	l, err := program.ListenLoopback(t.Context(), "--admin-address", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	entered := make(chan struct{})
	mux := http.NewServeMux()
	mux.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) {
		close(entered)
		<-r.Context().Done()
		time.Sleep(20 * time.Millisecond)
		_, _ = io.WriteString(w, "done")
	})
	program.Operate(mux, func() error { return errors.New("no mesh yet") }, program.Registry(), slog.New(slog.DiscardHandler))
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- program.Serve(ctx, l, mux, slog.New(slog.DiscardHandler)) }()
	if status, body := get(t, "http://"+l.Addr().String()+"/ready"); status != 503 || !strings.Contains(body, "no mesh yet") {
		t.Errorf("/ready: %d %q", status, body)
	}
	if status, body := get(t, "http://"+l.Addr().String()+"/metrics"); status != 200 || !strings.Contains(body, "go_goroutines") {
		t.Errorf("/metrics: %d", status)
	}
	go func() { <-entered; stop() }()
	if status, body := get(t, "http://"+l.Addr().String()+"/slow"); status != 200 || body != "done" {
		t.Errorf("the request that ran got %d %q", status, body)
	}
	if err := <-ended; err != nil {
		t.Errorf("Serve: %v", err)
	}
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}
