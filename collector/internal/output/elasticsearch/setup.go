package elasticsearch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/internal/output"
)

// Names and version of what setup makes. Raise the version with every change of
// the templates, so that clusters that have the old ones get the new.
const (
	templateName    = "logs-outrigger"
	componentName   = "logs-outrigger@mappings"
	templateVersion = 2
	// templatePriority is above the built-in logs template (100) and below the usual
	// ones of users and integrations (200 and more), which so have the last word.
	templatePriority = 150

	managedBy = "outrigger"

	setupAgain = time.Minute // after a failure that passes
	maxSetup   = 4 << 20     // bytes of an answer to setup's requests
)

// denied is an answer that another attempt will not change.
type denied struct {
	what   string
	status int
	reason string
}

func (d *denied) Error() string {
	return fmt.Sprintf("elasticsearch: setup: %s: status %d: %s", d.what, d.status, d.reason)
}

// ready sees to it that setup has been tried, and returns what Write must say
// instead of sending, nil in the normal case. Of concurrent calls one does it and
// the others wait for it.
func (o *Output) ready(ctx context.Context, now time.Time) *output.Result {
	if o.setupDone.Load() {
		return nil
	}
	o.setupMu.Lock()
	defer o.setupMu.Unlock()
	required := o.cfg.Setup == setupRequired
	if o.setupDone.Load() || !required && now.Before(o.setupNext) {
		return nil
	}
	did, err := o.install(ctx)
	var no *denied
	permanent := errors.As(err, &no)
	switch {
	case err == nil:
		o.setupDone.Store(true)
		if did != "" {
			o.log.Info("made the index template for logs in Elasticsearch", "outrigger.template", templateName, "outrigger.changes", did)
		}
	case required:
		return &output.Result{Err: fmt.Errorf("%w: grant the privilege manage_index_templates, or install the templates with an account that has it, or set setup: auto", err), Permanent: permanent}
	case permanent: // told once; another attempt would say the same
		o.setupDone.Store(true)
		o.log.Warn("cannot make the index template for logs in Elasticsearch; logs are sent all the same, with labels as fields of their own; grant manage_index_templates and view_index_metadata, or set setup: off",
			"outrigger.template", templateName, "error.message", err.Error())
	default: // the bulk request will tell of a server that is away
		o.setupNext = now.Add(setupAgain)
		o.log.Debug("cannot set up Elasticsearch yet", "error.message", err.Error())
	}
	return nil
}

// install makes the component template and the index template, or brings older
// ones of ours up to date. What somebody has changed, and what is not ours, is
// left as it is. It returns what it did, in words.
func (o *Output) install(ctx context.Context) (did string, err error) {
	var words []string
	for _, t := range []struct{ path, list, object string }{
		{"/_component_template/" + componentName, "component_templates", "component_template"},
		{"/_index_template/" + templateName, "index_templates", "index_template"},
	} {
		want := o.indexTemplate()
		if t.object == "component_template" {
			want = componentTemplate()
		}
		status, data, err := o.call(ctx, http.MethodGet, t.path, nil)
		if err != nil {
			return "", err
		}
		verb := "made"
		switch status {
		case http.StatusNotFound:
		case http.StatusOK:
			var have map[string][]map[string]json.RawMessage
			if err := json.Unmarshal(data, &have); err != nil || len(have[t.list]) != 1 {
				return "", &denied{"GET " + t.path, status, "the answer is not a template"}
			}
			replace, why := replaces(have[t.list][0][t.object], want)
			if !replace {
				if why != "" {
					o.log.Info("an index template is left as it is", "outrigger.template", t.path, "outrigger.reason", why)
				}
				continue
			}
			verb = "updated"
		default:
			return "", answered("GET "+t.path, status, data)
		}
		body, err := json.Marshal(want)
		if err != nil {
			return "", fmt.Errorf("elasticsearch: setup: %w", err)
		}
		if status, data, err = o.call(ctx, http.MethodPut, t.path, body); err != nil {
			return "", err
		}
		if status != http.StatusOK {
			return "", answered("PUT "+t.path, status, data)
		}
		words = append(words, verb+" "+t.path)
	}
	return strings.Join(words, ", "), nil
}

// template is a component template or an index template.
type template struct {
	IndexPatterns []string       `json:"index_patterns,omitempty"`
	Priority      int            `json:"priority,omitempty"`
	ComposedOf    []string       `json:"composed_of,omitempty"`
	IgnoreMissing []string       `json:"ignore_missing_component_templates,omitempty"`
	DataStream    map[string]any `json:"data_stream,omitzero"`
	Template      map[string]any `json:"template,omitempty"`
	Version       int            `json:"version,omitempty"`
	Meta          *meta          `json:"_meta,omitempty"`
}

type meta struct {
	ManagedBy string `json:"managed_by"`
	Version   int    `json:"version"`
	// Checksum of the template as we wrote it: another one means that somebody
	// changed it since.
	Checksum    string `json:"checksum"`
	Description string `json:"description,omitempty"`
}

// checksum covers what has an effect. Elasticsearch gives the templates back as
// they are written here; were it to write them otherwise, they would count as
// changed and be left alone.
func (t *template) checksum() string {
	data, err := json.Marshal([]any{t.IndexPatterns, t.Priority, t.ComposedOf, t.IgnoreMissing, t.Template})
	if err != nil {
		return ""
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:12])
}

// replaces reports whether want may take the place of what is there, and if not,
// why, unless it is there already.
func replaces(have json.RawMessage, want *template) (yes bool, why string) {
	var t template
	if err := json.Unmarshal(have, &t); err != nil || t.Meta == nil || t.Meta.ManagedBy != managedBy {
		return false, "it is not ours"
	}
	switch {
	case t.checksum() != t.Meta.Checksum:
		return false, "somebody changed it"
	case t.Meta.Version > want.Meta.Version:
		return false, "it is of a newer version"
	}
	return t.Meta.Version < want.Meta.Version || t.Meta.Checksum != want.Meta.Checksum, ""
}

func (t *template) sign(description string) *template {
	t.Version = templateVersion
	t.Meta = &meta{ManagedBy: managedBy, Version: templateVersion, Checksum: t.checksum(), Description: description}
	return t
}

// componentTemplate holds the mappings that the built-in ones lack. Its dynamic
// templates come after those of ecs@mappings and only have a say where the
// cluster does not have that.
func componentTemplate() *template {
	field := func(kind string) map[string]any { return map[string]any{"type": kind} }
	cut := func(kind string) map[string]any { return map[string]any{"type": kind, "ignore_above": 1024} }
	properties := func(p map[string]any) map[string]any { return map[string]any{"properties": p} }
	dynamic := func(name, kind, path string, mapping map[string]any) map[string]any {
		d := map[string]any{"match_mapping_type": kind, "mapping": mapping}
		if path != "" {
			d["path_match"] = path
		}
		return map[string]any{name: d}
	}
	return (&template{Template: map[string]any{"mappings": map[string]any{
		"properties": map[string]any{
			// With milliseconds the lines of one would be in any order.
			"@timestamp": field("date_nanos"),
			"kubernetes": properties(map[string]any{"labels": cut("flattened")}),
			"log":        properties(map[string]any{"offset": field("long"), "truncated_bytes": field("long")}),
			"outrigger":  properties(map[string]any{"extra": field("text")}),
		},
		"dynamic_templates": []any{
			dynamic("outrigger_message", "string", "message", field("text")),
			dynamic("outrigger_strings", "string", "", cut("keyword")),
			dynamic("outrigger_numbers", "double", "", field("double")),
		},
	}}}).sign("Mappings of Outrigger's logs. Put changes into " + templateName + "@custom: a changed template is not updated.")
}

// indexTemplate is for the data streams of our datasets. It is composed of what
// the built-in logs template is, so that malformed values are ignored, fields
// over the limit too, and the failure store takes the rest, wherever the cluster
// has these; @custom are the user's own.
func (o *Output) indexTemplate() *template {
	parts := []string{"logs@mappings", "logs@settings", "ecs@mappings"}
	custom := []string{"logs@custom", templateName + "@custom"}
	t := &template{
		IndexPatterns: []string{templateName + "*-*"},
		Priority:      templatePriority,
		ComposedOf:    append(append(parts, componentName), custom...),
		IgnoreMissing: append(append([]string(nil), parts...), custom...),
		DataStream:    map[string]any{},
	}
	if o.cfg.Retention != "" {
		t.Template = map[string]any{
			// logs@settings names a lifecycle policy, which would go before.
			"settings":  map[string]any{"index": map[string]any{"lifecycle": map[string]any{"prefer_ilm": "false"}}},
			"lifecycle": map[string]any{"enabled": true, "data_retention": o.cfg.Retention},
		}
	}
	return t.sign("Logs that Outrigger's collector writes. Put changes into " + templateName + "@custom: a changed template is not updated.")
}

// labelsFlattened reports whether kubernetes.labels is a flattened field where the
// stream's next record goes: in its newest backing index or, while there is none,
// in the one that the templates would make. A stream that we may not look at has
// fields, which every mapping takes.
func (o *Output) labelsFlattened(ctx context.Context, name string) (bool, error) {
	status, data, err := o.call(ctx, http.MethodGet, "/"+url.PathEscape(name)+"/_mapping/field/kubernetes.labels", nil)
	if err != nil {
		return false, err
	}
	const flattened = "flattened"
	switch status {
	case http.StatusOK:
		var indices map[string]struct {
			Mappings map[string]struct {
				Mapping map[string]struct {
					Type string `json:"type"`
				} `json:"mapping"`
			} `json:"mappings"`
		}
		if err := json.Unmarshal(data, &indices); err != nil {
			return false, fmt.Errorf("elasticsearch: mapping of %s: %w", name, err)
		}
		newest, kind := -1, ""
		for index, m := range indices {
			// A backing index ends in its generation; an index that is no data stream may
			// end in anything, but is the only one.
			generation, err := strconv.Atoi(index[strings.LastIndexByte(index, '-')+1:])
			if err != nil {
				generation = 0
			}
			if generation > newest {
				newest, kind = generation, m.Mappings["kubernetes.labels"].Mapping["labels"].Type
			}
		}
		return kind == flattened, nil
	case http.StatusNotFound:
		status, data, err = o.call(ctx, http.MethodPost, "/_index_template/_simulate_index/"+url.PathEscape(name)+"?filter_path=template.mappings.properties.kubernetes.properties.labels.type", nil)
		if err != nil {
			return false, err
		}
		if status == http.StatusOK {
			return bytes.Contains(data, []byte(`"`+flattened+`"`)), nil
		}
	}
	if err := answered("GET mapping of "+name, status, data); !errors.As(err, new(*denied)) {
		return false, err
	}
	return false, nil
}

// answered makes an error of an answer that was not hoped for.
func answered(what string, status int, data []byte) error {
	reason := reasonOf(data)
	if status == http.StatusTooManyRequests || status == http.StatusRequestTimeout || status >= 500 || status == http.StatusUnauthorized {
		return fmt.Errorf("elasticsearch: setup: %s: status %d: %s", what, status, reason)
	}
	return &denied{what, status, reason}
}

// call makes one request of setup's and reads its answer.
func (o *Output) call(ctx context.Context, method, path string, content []byte) (status int, answer []byte, err error) {
	req, err := http.NewRequestWithContext(ctx, method, path, bytes.NewReader(content))
	if err != nil {
		return 0, nil, fmt.Errorf("elasticsearch: setup: %w", err)
	}
	if len(content) > 0 {
		req.Header.Set("Content-Type", "application/json")
	} else {
		req.Body = nil
	}
	if err := o.authorize(req); err != nil {
		return 0, nil, err
	}
	resp, err := o.client.Perform(req)
	if err != nil {
		return 0, nil, fmt.Errorf("elasticsearch: setup: %s %s: %w", method, path, err)
	}
	defer func() { _ = resp.Body.Close() }() // read to its end or given up
	answer, err = io.ReadAll(io.LimitReader(resp.Body, maxSetup))
	if err != nil {
		return 0, nil, fmt.Errorf("elasticsearch: setup: %s %s: %w", method, path, err)
	}
	return resp.StatusCode, answer, nil
}
