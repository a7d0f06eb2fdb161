package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// Limits of a Watch.
const (
	// minWatch is how long a watch is asked to last at least; up to twice that, by
	// chance, so that a thousand nodes do not come back in the same second.
	minWatch      = 5 * time.Minute
	minBackoff    = time.Second
	maxBackoff    = time.Minute
	maxRetryAfter = 5 * time.Minute
)

// Type of a change.
type Type string

// Types that a watch tells of.
const (
	Added    Type = "ADDED"
	Modified Type = "MODIFIED"
	Deleted  Type = "DELETED"
	bookmark Type = "BOOKMARK"
	failure  Type = "ERROR"
)

// Watch is one list of a collection and then one watch of it for as long as Run
// runs. A watch that ends goes on from the last version seen; the collection is
// listed again only when the API server no longer has that version. The list is
// asked for with resourceVersion=0: the API server may answer from its memory
// without asking etcd.
//
// Its functions are called by one goroutine, that of Run.
type Watch[T any] struct {
	Client *Client
	// Path of the collection and the selectors.
	Path  string
	Query url.Values
	// Metadata asks for the objects' metadata only.
	Metadata bool
	// From, where it is given, is the version to start from without a list.
	From string
	// Version returns the object's resourceVersion.
	Version func(*T) string
	// Begin is called before the objects of a list, End after the last of them.
	Begin, End func()
	// Listed is called with each object of a list. The list may turn out cut short;
	// then Begin comes again before End.
	Listed func(*T)
	// Changed is called with each object of the watch. After an error the watch
	// goes on from before this change.
	Changed func(Type, *T) error
	// Reached is called with every version up to which all changes have been
	// handed over. May be nil.
	Reached func(version string)
	// Failed is called for each attempt that ended in an error. May be nil.
	Failed func(error)
	// Jitter bounds the random wait before the first request.
	Jitter time.Duration
	Log    *slog.Logger
}

// errGone says that the API server no longer has the version.
var errGone = errors.New("the version is too old")

// Run lists and watches until ctx ends; it returns nil then. Errors are tried
// again with a growing, random wait.
func (w *Watch[T]) Run(ctx context.Context) error {
	version, backoff, healthy := w.From, minBackoff, true
	if !pause(ctx, spread(w.Jitter)) {
		return nil
	}
	for ctx.Err() == nil {
		var err error
		if version == "" {
			version, err = w.list(ctx)
		}
		if err == nil {
			var progress bool
			version, progress, err = w.watch(ctx, version)
			if progress {
				backoff = minBackoff
			}
		}
		switch {
		case ctx.Err() != nil:
			return nil //nolint:nilerr // it failed because it was to end
		case err == nil:
			healthy = true
			// A server that ends every watch at once is not asked without rest.
			if !pause(ctx, spread(minBackoff)) {
				return nil
			}
			continue
		case errors.Is(err, errGone):
			version = ""
			w.Log.Debug("watch has to list again", "url.path", w.Path, "error.message", err.Error())
			if !pause(ctx, spread(backoff)) {
				return nil
			}
			backoff = min(2*backoff, maxBackoff) // until there is progress
			continue
		}
		if w.Failed != nil {
			w.Failed(err)
		}
		if healthy { // once an outage
			w.Log.Warn("cannot watch; trying again", "url.path", w.Path, "error.message", err.Error())
			healthy = false
		}
		wait := backoff/2 + spread(backoff)
		var s *StatusError
		if errors.As(err, &s) {
			wait = max(wait, s.RetryAfter)
		}
		if !pause(ctx, wait) {
			return nil
		}
		backoff = min(2*backoff, maxBackoff)
	}
	return nil
}

func (w *Watch[T]) list(ctx context.Context) (string, error) {
	q := maps.Clone(w.Query)
	if q == nil {
		q = url.Values{}
	}
	q.Set("resourceVersion", "0")
	if w.Begin != nil {
		w.Begin()
	}
	version, err := List(ctx, w.Client, Request{Path: w.Path, Query: q, Metadata: w.Metadata}, w.Listed)
	if err != nil {
		return "", err
	}
	if version == "" {
		return "", fmt.Errorf("%s: the list has no resourceVersion", w.Path)
	}
	if w.End != nil {
		w.End()
	}
	w.reached(version)
	return version, nil
}

func (w *Watch[T]) reached(version string) {
	if w.Reached != nil {
		w.Reached(version)
	}
}

// watch follows changes after version, and returns the last version that was
// seen and whether any was.
func (w *Watch[T]) watch(ctx context.Context, version string) (last string, progress bool, err error) {
	lasts := minWatch + spread(minWatch)
	q := maps.Clone(w.Query)
	if q == nil {
		q = url.Values{}
	}
	q.Set("watch", "1")
	q.Set("allowWatchBookmarks", "true")
	q.Set("resourceVersion", version)
	q.Set("timeoutSeconds", strconv.Itoa(int(lasts.Seconds())))
	// A connection that died without a word ends with this.
	ctx, cancel := context.WithTimeout(ctx, lasts+Timeout)
	defer cancel()
	accept := acceptJSON
	if w.Metadata {
		accept = acceptMetadata
	}
	resp, err := w.Client.do(ctx, Request{Path: w.Path, Query: q}, accept)
	if err != nil {
		// Too large is a version of before etcd was restored.
		if Code(err) == http.StatusGone || Code(err) == http.StatusGatewayTimeout && strings.Contains(err.Error(), "Too large resource version") {
			err = fmt.Errorf("%w: %w", errGone, err)
		}
		return version, false, err
	}
	defer func() { _ = resp.Body.Close() }()
	limit := &io.LimitedReader{R: resp.Body}
	dec := json.NewDecoder(limit)
	for {
		limit.N = MaxObject
		var e struct {
			Type   Type            `json:"type"`
			Object json.RawMessage `json:"object"`
		}
		if err := dec.Decode(&e); err != nil {
			if errors.Is(err, io.EOF) && limit.N > 0 {
				return version, progress, nil // the server ended it, as it was asked to
			}
			return version, progress, fmt.Errorf("watch of %s: %w", w.Path, err)
		}
		if e.Type == failure {
			return version, progress, w.failure(e.Object)
		}
		object := new(T)
		if err := json.Unmarshal(e.Object, object); err != nil {
			return version, progress, fmt.Errorf("watch of %s: %w", w.Path, err)
		}
		switch e.Type {
		case Added, Modified, Deleted:
			if err := w.Changed(e.Type, object); err != nil {
				return version, progress, fmt.Errorf("watch of %s: %w", w.Path, err)
			}
		case bookmark:
		default:
			w.Log.Debug("watch tells of something unknown", "url.path", w.Path, "outrigger.type", string(e.Type))
			continue
		}
		if v := w.Version(object); v != "" {
			version, progress = v, true
			w.reached(v)
		}
	}
}

func (w *Watch[T]) failure(object []byte) error {
	var s status
	if err := json.Unmarshal(object, &s); err != nil {
		return fmt.Errorf("watch of %s ended with an error that is none: %w", w.Path, err)
	}
	e := &StatusError{Code: s.Code, Reason: s.Reason, Message: s.Message, RetryAfter: min(time.Duration(s.Details.RetryAfterSeconds)*time.Second, maxRetryAfter)}
	if s.Code == http.StatusGone || s.Reason == "Expired" || s.Reason == "Gone" {
		return fmt.Errorf("watch of %s: %w: %w", w.Path, errGone, e)
	}
	return fmt.Errorf("watch of %s: %w", w.Path, e)
}

// spread returns a random part of d.
func spread(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return rand.N(d)
}

// pause waits and reports whether ctx still goes on.
func pause(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
