package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmihailenco/msgpack/v5"
)

func TestLinesAreAsLongAsThePageSays(t *testing.T) {
	dir := t.TempDir()
	a, err := writeAll(dir, 1_000_000)
	if err != nil {
		t.Fatal(err)
	}
	var bytesRead, lines int64
	files, err := filepath.Glob(filepath.Join(dir, "*", "*", "*.log"))
	if err != nil || len(files) != containers {
		t.Fatalf("%d files: %v", len(files), err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		bytesRead += int64(len(b))
		lines += int64(bytes.Count(b, []byte{'\n'}))
	}
	if bytesRead != a.bytes || lines != a.lines {
		t.Errorf("%d bytes and %d lines are there, %d and %d were counted", bytesRead, lines, a.bytes, a.lines)
	}
	if each := bytesRead / lines; each < 180 || each > 220 {
		t.Errorf("a line has %d bytes", each)
	}
}

func TestTheBulkSinkCountsAndAnswersEachDocument(t *testing.T) {
	s, err := newSink(t.Context(), "bulk")
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	for range 2 { // the second with a reader of the pool
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		_, _ = z.Write([]byte(strings.Repeat("{\"create\":{}}\n{\"a\":1}\n", 7)))
		_ = z.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+s.addr+"/_bulk", &b)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Encoding", "gzip")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		var answer bytes.Buffer
		_, err = answer.ReadFrom(resp.Body)
		_ = resp.Body.Close() // it was read
		if err != nil || strings.Count(answer.String(), `"status":201`) != 7 {
			t.Errorf("%v %s", err, answer.String())
		}
	}
	if n := s.records.Load(); n != 14 {
		t.Errorf("%d counted", n)
	}
}

func TestTheForwardSinkCountsAndAcknowledges(t *testing.T) {
	s, err := newSink(t.Context(), "forward")
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	c, err := net.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	d := msgpack.NewDecoder(c)
	for _, m := range [][]any{
		{"t", 1, map[string]any{"a": 1}, map[string]any{"chunk": "x"}},
		{"t", []any{[]any{1, map[string]any{}}, []any{2, map[string]any{}}}, map[string]any{"chunk": "x"}},
		{"t", []byte("not looked at"), map[string]any{"chunk": "x", "size": 5}},
	} {
		b, err := msgpack.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
		var answer map[string]string
		if err := d.Decode(&answer); err != nil || answer["ack"] != "x" {
			t.Fatalf("%v %v", answer, err)
		}
	}
	if n := s.records.Load(); n != 8 {
		t.Errorf("%d counted", n)
	}
}

func TestTheMedianCounts(t *testing.T) {
	r := results{Targets: targets(), Bytes: 100, Lines: 1}
	for _, cpu := range []float64{30, 10, 20} {
		r.add(rate{Name: "outrigger", To: "bulk", CPU: cpu})
		r.add(rate{Name: "otelcol", To: "otlp", CPU: 2 * cpu})
	}
	m := r.median()
	if len(m) != 2 || m[0].CPU != 20 || m[1].CPU != 40 {
		t.Errorf("%+v", m)
	}
	if page := r.page(); !strings.Contains(page, "0.50 (of otlp)") {
		t.Error(page)
	}
}
