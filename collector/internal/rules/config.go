// Package rules decides what becomes of a record: how it is parsed, whether it
// is kept, and what of it is sent where. It reads the rules of the configuration
// and the annotations of pods, ours and those of other collectors that mean the
// same.
//
// It knows records and their resources. It does not know files, time or
// backends: quotas count in the time of the records, so that a backlog is not
// taken for a flood and a record that is sent again has the same verdict.
// Package tail asks it how lines are joined, package pipeline what to do with a
// record.
package rules

import (
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/outrigger-mesh/outrigger/collector/internal/multiline"
	"github.com/outrigger-mesh/outrigger/collector/internal/parse"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Limits of a configuration.
const (
	MaxRules    = 1000
	MaxQuotas   = 1000
	MaxPatterns = 64   // in one rule
	MaxPattern  = 4096 // bytes of a regular expression or glob
	MaxFields   = 64   // that one rule renames, removes or sets
)

// Config is the part of the configuration that says what becomes of records.
//
//	rules:
//	  - name: no-health-checks
//	    match: {namespaces: [shop-*], field: {name: url.path, equals: /healthz}}
//	    drop: true
//	  - name: cards
//	    redact: {kinds: [card, email]}
//	quotas:
//	  - name: default
//	    bytesPerSecond: 1048576
//	    action: sample
//	    rate: 0.1
type Config struct {
	Rules  []Rule  `yaml:"rules"`
	Quotas []Quota `yaml:"quotas"`
}

// Rule is one action for the records that it matches. Rules are applied in
// their order; what one changes, the next sees.
type Rule struct {
	// Name is shown with every line that the rule took.
	Name  string `yaml:"name"`
	Match Match  `yaml:"match"`

	// Exactly one of these.

	// Parse is a specification of package parse. Of several that match the first
	// is taken. It may not depend on what only a parsed line tells.
	Parse string `yaml:"parse"`
	// Multiline is a specification of package multiline, as Parse.
	Multiline string `yaml:"multiline"`
	Drop      bool   `yaml:"drop"`
	// Keep protects the record from the drops and samples of later rules, and
	// from quotas.
	Keep   bool              `yaml:"keep"`
	Sample *Sample           `yaml:"sample"`
	Redact *Redact           `yaml:"redact"`
	Rename map[string]string `yaml:"rename"`
	Remove []string          `yaml:"remove"`
	Set    map[string]string `yaml:"set"`
	// Route names the outputs that get the record; all others do not. The last
	// rule that matches counts.
	Route []string `yaml:"route"`
}

// Match says which records a rule is for: those for which all that is stated
// holds. A list holds if one of its members does. Globs know * and ?.
type Match struct {
	Namespaces []string `yaml:"namespaces"` // globs
	Workloads  []string `yaml:"workloads"`  // globs of the workload's name, or of the service's where it is not known
	Containers []string `yaml:"containers"` // globs
	// Of the pod, and of its namespace; values are globs, and * is any value.
	Labels          map[string]string `yaml:"labels"`
	Annotations     map[string]string `yaml:"annotations"`
	NamespaceLabels map[string]string `yaml:"namespaceLabels"`
	Streams         []string          `yaml:"streams"` // stdout, stderr
	// Level is the lowest that matches: warn is warn, error and fatal. A record
	// without a level does not match.
	Level string `yaml:"level"`
	// Body is a regular expression (RE2).
	Body  string `yaml:"body"`
	Field *Field `yaml:"field"`
}

// Field is a condition on one field by its ECS name: exactly one of Equals,
// Exists and Regex.
type Field struct {
	Name   string  `yaml:"name"`
	Equals *string `yaml:"equals"` // as the field is printed: 503, true, shop
	Exists *bool   `yaml:"exists"`
	Regex  string  `yaml:"regex"`
}

// Sample keeps a share of the records, chosen by their place in their file: every
// output and every repetition keeps the same.
type Sample struct {
	Rate float64 `yaml:"rate"` // 0 to 1
}

// Redact replaces secrets in the body and in all values of text.
type Redact struct {
	Kinds    []string `yaml:"kinds"`    // card, email, token, ip, iban
	Patterns []string `yaml:"patterns"` // regular expressions (RE2)
	With     string   `yaml:"with"`     // default [redacted]
}

// Quota bounds what a namespace may send, in bytes of bodies. Of several that
// match a namespace the first is taken; each namespace has its own count.
type Quota struct {
	Name  string     `yaml:"name"`
	Match QuotaMatch `yaml:"match"`
	// BytesPerSecond is an average over 10 seconds, in the time of the records.
	BytesPerSecond int64 `yaml:"bytesPerSecond"`
	// BytesPerDay is counted from midnight UTC, in the time of the records.
	BytesPerDay int64 `yaml:"bytesPerDay"`
	// Action on what is over: warn (counted only), sample or drop.
	Action string  `yaml:"action"`
	Rate   float64 `yaml:"rate"` // of sample: the share that is kept
}

// QuotaMatch says which namespaces a quota is for; all, if it says nothing.
type QuotaMatch struct {
	Namespaces []string `yaml:"namespaces"` // globs
}

var levels = map[string]uint8{"trace": 1, "debug": 2, "info": 3, "warn": 4, "error": 5, "fatal": 6}

// Validate has one line for each thing that is wrong. Names of outputs are
// checked by Compile, which knows them.
func (c Config) Validate() error {
	_, err := c.compile("", nil)
	return err
}

// compile checks everything and makes what Set needs. With outputs, it checks
// that routes name them.
func (c Config) compile(output string, outputs []string) (*Set, error) {
	s := &Set{output: output, outputs: outputs, quotas: make([]*quota, 0, len(c.Quotas))}
	var errs []error
	if len(c.Rules) > MaxRules {
		return nil, fmt.Errorf("rules: there are %d; at most %d are read", len(c.Rules), MaxRules)
	}
	if len(c.Quotas) > MaxQuotas {
		return nil, fmt.Errorf("quotas: there are %d; at most %d are read", len(c.Quotas), MaxQuotas)
	}
	var err error
	if s.lines, err = multiline.Compile("auto"); err != nil {
		return nil, err
	}
	names := map[string]bool{}
	for i, r := range c.Rules {
		bad := func(field string, value any, remedy string) {
			errs = append(errs, fmt.Errorf("rules[%d] %q: %s: %v: %s", i, r.Name, field, value, remedy))
		}
		if r.Name == "" || names[r.Name] || len(r.Name) > 128 {
			bad("name", fmt.Sprintf("%.128q", r.Name), "give each rule a name of its own, of at most 128 bytes; it is shown with the lines that it took")
		}
		names[r.Name] = true
		s.rules = append(s.rules, r.compile(output, outputs, bad))
	}
	names = map[string]bool{}
	for i, q := range c.Quotas {
		bad := func(field string, value any, remedy string) {
			errs = append(errs, fmt.Errorf("quotas[%d] %q: %s: %v: %s", i, q.Name, field, value, remedy))
		}
		if q.Name == "" || names[q.Name] || len(q.Name) > 128 {
			bad("name", fmt.Sprintf("%.128q", q.Name), "give each quota a name of its own, of at most 128 bytes")
		}
		names[q.Name] = true
		s.quotas = append(s.quotas, q.compile(bad))
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return s, nil
}

type complain func(field string, value any, remedy string)

func (r Rule) compile(output string, outputs []string, bad complain) *rule {
	c := &rule{name: r.Name, match: r.Match.compile(bad)}
	var err error
	var actions []string
	is := func(action string, set bool, a actionKind) bool {
		if set {
			actions = append(actions, action)
			c.action = a
		}
		return set
	}
	if is("parse", r.Parse != "", doParse) {
		if c.parser, err = parse.Compile(r.Parse); err != nil {
			bad("parse", r.Parse, err.Error())
		}
	}
	if is("multiline", r.Multiline != "", doMultiline) {
		if c.lines, err = multiline.Compile(r.Multiline); err != nil {
			bad("multiline", r.Multiline, err.Error())
		}
	}
	is("drop", r.Drop, doDrop)
	is("keep", r.Keep, doKeep)
	if is("sample", r.Sample != nil, doSample) {
		if r.Sample.Rate < 0 || r.Sample.Rate > 1 || r.Sample.Rate != r.Sample.Rate {
			bad("sample.rate", r.Sample.Rate, "write the share that is kept, from 0 to 1")
		}
		c.below = share(r.Sample.Rate)
	}
	if is("redact", r.Redact != nil, doRedact) {
		c.redact = r.Redact.compile(bad)
	}
	if is("rename", len(r.Rename) > 0, doRename) {
		for _, from := range slices.Sorted(maps.Keys(r.Rename)) {
			checkName("rename", from, bad)
			checkName("rename", r.Rename[from], bad)
			c.names = append(c.names, pair{from, r.Rename[from]})
		}
	}
	if is("remove", len(r.Remove) > 0, doRemove) {
		for _, name := range r.Remove {
			checkName("remove", name, bad)
			c.names = append(c.names, pair{from: name})
		}
	}
	if is("set", len(r.Set) > 0, doSet) {
		for _, name := range slices.Sorted(maps.Keys(r.Set)) {
			checkName("set", name, bad)
			c.names = append(c.names, pair{name, r.Set[name]})
		}
	}
	if is("route", len(r.Route) > 0, doRoute) {
		for _, name := range r.Route {
			if outputs != nil && !slices.Contains(outputs, name) {
				bad("route", name, "no output of that name gets logs; write one of "+strings.Join(outputs, ", "))
			}
		}
		c.here = slices.Contains(r.Route, output)
	}
	if len(c.names) > MaxFields {
		bad(actions[0], len(c.names), fmt.Sprintf("name at most %d fields", MaxFields))
	}
	if len(actions) != 1 {
		bad("action", strings.Join(actions, ", "), "write exactly one of parse, multiline, drop, keep, sample, redact, rename, remove, set and route")
	}
	if c.action == doParse || c.action == doMultiline {
		if c.match.level != 0 || c.match.body != nil || c.match.field != nil || c.action == doMultiline && len(c.match.streams) > 0 {
			bad("match", "level, body, field or streams", "a rule that says how lines are read cannot depend on what is read from them; match the container instead")
		}
	}
	return c
}

func (m Match) compile(bad complain) *match {
	c := &match{
		namespaces: m.Namespaces, workloads: m.Workloads, containers: m.Containers,
		labels: m.Labels, annotations: m.Annotations, namespaceLabels: m.NamespaceLabels, streams: m.Streams,
	}
	globs := func(field string, list []string) {
		if len(list) > MaxPatterns {
			bad(field, len(list), fmt.Sprintf("write at most %d", MaxPatterns))
		}
		for _, g := range list {
			if g == "" || len(g) > MaxPattern {
				bad(field, fmt.Sprintf("%.40q", g), fmt.Sprintf("write a name, with * and ? for what may differ, of 1 to %d bytes", MaxPattern))
			}
		}
	}
	globs("match.namespaces", m.Namespaces)
	globs("match.workloads", m.Workloads)
	globs("match.containers", m.Containers)
	for field, of := range map[string]map[string]string{"match.labels": m.Labels, "match.annotations": m.Annotations, "match.namespaceLabels": m.NamespaceLabels} {
		if len(of) > MaxPatterns {
			bad(field, len(of), fmt.Sprintf("write at most %d", MaxPatterns))
		}
	}
	for _, s := range m.Streams {
		if s != "stdout" && s != "stderr" {
			bad("match.streams", s, "write stdout or stderr")
		}
	}
	if m.Level != "" {
		if c.level = levels[m.Level]; c.level == 0 {
			bad("match.level", m.Level, "write trace, debug, info, warn, error or fatal")
		}
	}
	c.body = expression("match.body", m.Body, bad)
	if f := m.Field; f != nil {
		n := 0
		for _, set := range [...]bool{f.Equals != nil, f.Exists != nil, f.Regex != ""} {
			if set {
				n++
			}
		}
		if f.Name == "" || n != 1 {
			bad("match.field", f.Name, "write a name and exactly one of equals, exists and regex")
		}
		c.field = &field{name: f.Name, equals: f.Equals, exists: f.Exists, regex: expression("match.field.regex", f.Regex, bad)}
	}
	return c
}

func expression(name, expr string, bad complain) *regexp.Regexp {
	if expr == "" {
		return nil
	}
	if len(expr) > MaxPattern {
		bad(name, fmt.Sprintf("%.40q", expr), fmt.Sprintf("write at most %d bytes", MaxPattern))
		return nil
	}
	re, err := regexp.Compile(expr)
	if err != nil {
		bad(name, fmt.Sprintf("%q", expr), err.Error()+"; write it as RE2 reads it (no look-around, no back references)")
	}
	return re
}

// checkName refuses fields that a rule cannot change, because they are not of
// the line but of where it comes from.
func checkName(action, name string, bad complain) {
	if name == "" || len(name) > record.MaxName {
		bad(action, fmt.Sprintf("%.40q", name), fmt.Sprintf("write a field's name of 1 to %d bytes", record.MaxName))
		return
	}
	for _, prefix := range [...]string{"kubernetes.", "container.", "orchestrator.", "host.", "log.file.", "log.offset", "log.truncated_bytes", record.Timestamp} {
		if strings.HasPrefix(name, prefix) || name == record.StreamName {
			bad(action, name, "the field says where the line comes from and cannot be changed; name another")
			return
		}
	}
	if name == record.Message && action != "set" {
		bad(action, name, "the message is the line itself; use drop to leave it out")
	}
}

func (q Quota) compile(bad complain) *quota {
	c := &quota{name: q.Name, namespaces: q.Match.Namespaces, perSecond: q.BytesPerSecond, perDay: q.BytesPerDay}
	if q.BytesPerSecond < 0 || q.BytesPerDay < 0 || q.BytesPerSecond == 0 && q.BytesPerDay == 0 {
		bad("bytesPerSecond, bytesPerDay", fmt.Sprint(q.BytesPerSecond, ", ", q.BytesPerDay), "write at least one of them, above 0")
	}
	switch q.Action {
	case "warn":
		c.below = share(1)
	case "sample":
		c.below = share(q.Rate)
	case "drop":
	default:
		bad("action", fmt.Sprintf("%q", q.Action), "write warn, sample or drop")
	}
	if q.Action == "sample" && !(q.Rate > 0 && q.Rate < 1) || q.Action != "sample" && q.Rate != 0 {
		bad("rate", q.Rate, "write the share that is kept with action sample, between 0 and 1, and nothing with others")
	}
	return c
}
