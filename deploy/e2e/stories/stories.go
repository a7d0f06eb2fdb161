// Package stories are what users do with the product on a cluster, told from
// beginning to end on a real one. Each says in numbers what happened, and fails
// when it is not what was promised.
//
// They know the cluster by package cluster only, and the product by what its users
// see: labels, annotations, objects, commands, logs.
package stories

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger/deploy/e2e/cluster"
)

// Stories are told by Tell, on one cluster, in order.
type Stories struct {
	Cluster *cluster.Cluster
	Only    *regexp.Regexp
	Folder  string // for results
	Root    string // the checkout
	Bin     string // programs of the product that run outside of pods
	Report  func(format string, args ...any)
}

// Result is what became of a story, as result.json has it.
type Result struct {
	Story    string  `json:"story"`
	Passed   bool    `json:"passed"`
	Seconds  float64 `json:"seconds"`
	Requests int     `json:"requests"`
	Failed   int     `json:"failed"`
	Why      string  `json:"why,omitempty"`
}

// story is one of them. Its namespace is called like it.
type story struct {
	name string
	tell func(context.Context, *scene) error
	// mesh: it needs the product; else it is told on any cluster.
	mesh bool
	// labelled: its namespace is enabled for injection from the beginning.
	labelled bool
}

// scene is what a story works with.
type scene struct {
	*cluster.Cluster
	namespace         string
	root, bin, folder string
	report            func(format string, args ...any)
	// requests and failed are what the story did and what became of it.
	requests, failed int
}

// within is how long a story may take, whatever it waits for.
const within = 20 * time.Minute

func all() []story {
	return []story{
		{name: "plain", tell: plain},
		{name: "label", tell: labelled, mesh: true},
		{name: "shop", tell: shop, mesh: true, labelled: true},
		{name: "jobs", tell: jobs, mesh: true, labelled: true},
		{name: "rollout", tell: rollout, mesh: true, labelled: true},
		{name: "scale", tell: scale, mesh: true, labelled: true},
		{name: "drain", tell: drain, mesh: true, labelled: true},
		{name: "control-plane", tell: controlPlane, mesh: true, labelled: true},
		{name: "collector", tell: collectors, mesh: true, labelled: true},
		{name: "metadata", tell: metadata, mesh: true},
		{name: "events", tell: events, mesh: true},
		{name: "accounts", tell: accounts, mesh: true},
		{name: "strict", tell: strict, mesh: true, labelled: true},
		{name: "authorization", tell: authorization, mesh: true, labelled: true},
		{name: "audit", tell: audit, mesh: true, labelled: true},
		{name: "envoy", tell: envoy, mesh: true, labelled: true},
		{name: "rotation", tell: rotation, mesh: true, labelled: true},
		{name: "conformance", tell: conformance, mesh: true},
		// The last: it takes the API server away, and whoever watches it (kube-proxy among
		// them) waits for up to a minute before it asks again.
		{name: "kubelet", tell: kubelet, mesh: true},
	}
}

// Tell tells the stories and returns whether all passed.
func (s *Stories) Tell(ctx context.Context) (bool, error) {
	var results []Result
	ok := true
	for _, st := range all() {
		if !s.Only.MatchString(st.name) || ctx.Err() != nil {
			continue
		}
		sc := &scene{Cluster: s.Cluster, namespace: st.name, root: s.Root, bin: s.Bin, folder: s.Folder, report: s.Report}
		began := time.Now()
		err := sc.play(ctx, st)
		r := Result{Story: st.name, Passed: err == nil, Seconds: time.Since(began).Round(100 * time.Millisecond).Seconds(), Requests: sc.requests, Failed: sc.failed}
		word := "passed"
		if err != nil {
			ok, word = false, "FAILED"
			r.Why, _, _ = strings.Cut(err.Error(), "\n")
		}
		s.Report("%-6s %-22s %5.1f s  %6d requests, %d failed", word, r.Story, r.Seconds, r.Requests, r.Failed)
		if err != nil {
			s.Report("%s: %v%s", st.name, err, s.Cluster.Describe(context.WithoutCancel(ctx), sc.namespace))
			if st.mesh {
				s.Report("the product:%s", s.Cluster.Describe(context.WithoutCancel(ctx), system))
			}
		}
		results = append(results, r)
	}
	text, err := json.MarshalIndent(results, "", "  ")
	if err != nil {
		return false, fmt.Errorf("results: %w", err)
	}
	if err := os.WriteFile(filepath.Join(s.Folder, "result.json"), append(text, '\n'), 0o644); err != nil {
		return false, fmt.Errorf("results: %w", err)
	}
	fmt.Printf("\n%-24s %-7s %8s %10s %8s\n", "story", "", "seconds", "requests", "failed")
	for _, r := range results {
		word := "passed"
		if !r.Passed {
			word = "FAILED"
		}
		fmt.Printf("%-24s %-7s %8.1f %10d %8d\n", r.Story, word, r.Seconds, r.Requests, r.Failed)
	}
	if len(results) == 0 {
		return false, errors.New("no story has that name")
	}
	return ok && ctx.Err() == nil, ctx.Err()
}

// play tells one story in a namespace of its own, which is removed when it ended well.
func (sc *scene) play(ctx context.Context, st story) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	if err := sc.Apply(ctx, "{apiVersion: v1, kind: Namespace, metadata: {name: "+sc.namespace+"}}"); err != nil {
		return err
	}
	if st.labelled {
		if err := sc.label(ctx, injection, "enabled"); err != nil {
			return err
		}
	}
	if err := st.tell(ctx, sc); err != nil {
		return err
	}
	return sc.Delete(ctx, "{apiVersion: v1, kind: Namespace, metadata: {name: "+sc.namespace+"}}")
}
