package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"syscall"
)

// maxLine bounds one record that the collector sends: a line of 1 MiB, six times
// as long where JSON escapes every byte, and its fields.
const maxLine = 16 << 20

// get asks the collector. Its refusals are plain text and are passed on.
func (c *cli) get(ctx context.Context, path string, query url.Values) (io.ReadCloser, error) {
	return c.ask(ctx, http.MethodGet, path, query)
}

// post tells it to do something.
func (c *cli) post(ctx context.Context, path string, query url.Values) (io.ReadCloser, error) {
	return c.ask(ctx, http.MethodPost, path, query)
}

func (c *cli) ask(ctx context.Context, method, path string, query url.Values) (io.ReadCloser, error) {
	u := url.URL{Scheme: "http", Host: c.collector, Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), nil)
	if err != nil {
		return nil, fmt.Errorf("--collector %q is not host:port: %w", c.collector, err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.http.Do(req)
	if err != nil {
		if errors.Is(err, syscall.ECONNREFUSED) {
			return nil, fmt.Errorf("no collector answers at %s: start one, or give its address with --collector: %w", c.collector, err)
		}
		return nil, fmt.Errorf("ask the collector at %s: %w", c.collector, err)
	}
	if resp.StatusCode != http.StatusOK {
		defer func() { _ = resp.Body.Close() }() // read what it says, nothing more
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
		return nil, &refusal{status: resp.StatusCode, text: message(text)}
	}
	return resp.Body, nil
}

// refusal is an answer of the collector that is not what was asked for.
type refusal struct {
	status int
	text   string
}

func (r *refusal) Error() string { return r.text }

func message(text []byte) string {
	var v struct {
		Error string `json:"error"`
	}
	if json.Unmarshal(text, &v) == nil && v.Error != "" {
		return v.Error
	}
	return strings.TrimSpace(string(text))
}

// records calls f with every record of an NDJSON answer.
func (c *cli) records(ctx context.Context, path string, query url.Values, f func(line []byte, fields map[string]any) error) error {
	body, err := c.get(ctx, path, query)
	if err != nil {
		return err
	}
	defer func() { _ = body.Close() }() // the answer has been read or given up
	s := bufio.NewScanner(body)
	s.Buffer(make([]byte, 64<<10), maxLine)
	for s.Scan() {
		var fields map[string]any
		if err := json.Unmarshal(s.Bytes(), &fields); err != nil {
			return fmt.Errorf("the collector at %s sent a line that is not JSON: %w", c.collector, err)
		}
		if text, ok := fields["error"].(string); ok && len(fields) == 1 {
			return errors.New(text)
		}
		if err := f(s.Bytes(), fields); err != nil {
			return err
		}
	}
	return s.Err()
}
