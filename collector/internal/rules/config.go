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
	// BytesPerSecond is an average in the time of the records; a burst of 10
	// seconds is let through.
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
