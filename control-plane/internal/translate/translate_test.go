package translate_test

import (
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/tools/txtar"
	"sigs.k8s.io/yaml"

	"github.com/outrigger-mesh/outrigger/control-plane/identity"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/manifests"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/translate"
	"github.com/outrigger-mesh/outrigger/golden"
)

// TestGolden builds the mesh of each testdata/*.txtar from the files under
// input/ and compares it, and the problems, with want/mesh and want/problems.
// The objects are shuffled several times: their order makes no difference.
func TestGolden(t *testing.T) {
	golden.Cases(t, "testdata/*.txtar", func(t *testing.T, c *golden.Case) {
		objects, got := load(t, c)
		m, problems, statuses := translate.Build(objects, translate.Options{})
		for _, p := range problems {
			got += p.String() + " [" + string(p.Reason) + "]\n"
		}
		c.Want("want/mesh", dump(m))
		c.Want("want/problems", got)
		c.Want("want/status", dumpStatus(statuses))

		r := rand.New(rand.NewPCG(1, 2))
		for range 20 {
			shuffle(r, &objects)
			m2, problems2, statuses2 := translate.Build(objects, translate.Options{})
			if !reflect.DeepEqual(m, m2) {
				t.Fatalf("the mesh depends on the order of the objects (-first +shuffled):\n%s",
					cmp.Diff(m, m2, cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{})))
			}
			if !reflect.DeepEqual(problems, problems2) {
				t.Fatalf("the problems depend on the order of the objects (-first +shuffled):\n%s", cmp.Diff(problems, problems2))
			}
			if !reflect.DeepEqual(statuses, statuses2) {
				t.Fatalf("the statuses depend on the order of the objects (-first +shuffled):\n%s", cmp.Diff(statuses, statuses2))
			}
		}
	})
}

// load reads the input as a user's folder is read. Problems with the files
// come first.
func load(t *testing.T, c *golden.Case) (translate.Objects, string) {
	t.Helper()
	dir := t.TempDir()
	for _, f := range c.Inputs("input/") {
		if err := os.WriteFile(filepath.Join(dir, f.Name), f.Data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	objects, problems := manifests.New(dir, slog.New(slog.DiscardHandler)).Load()
	var out strings.Builder
	for _, p := range problems {
		out.WriteString(p.String() + " [" + string(p.Reason) + "]\n")
	}
	return objects, out.String()
}

func shuffle(r *rand.Rand, o *translate.Objects) {
	mix(r, o.Namespaces)
	mix(r, o.Services)
	mix(r, o.EndpointSlices)
	mix(r, o.Pods)
	mix(r, o.HTTPRoutes)
	mix(r, o.GRPCRoutes)
	mix(r, o.ReferenceGrants)
	mix(r, o.AuthorizationPolicies)
	mix(r, o.TLSRoutes)
	mix(r, o.Workloads)
	mix(r, o.CircuitBreakers)
	mix(r, o.RetryPolicies)
}

func mix[T any](r *rand.Rand, s []T) { r.Shuffle(len(s), func(i, j int) { s[i], s[j] = s[j], s[i] }) }

func TestTrustDomain(t *testing.T) {
	f := func(in, want string) {
		t.Helper()
		if m, _, _ := translate.Build(translate.Objects{}, translate.Options{TrustDomain: in}); m.TrustDomain != want {
			t.Errorf("trust domain %q: got %q, want %q", in, m.TrustDomain, want)
		}
	}
	f("", identity.DefaultTrustDomain)
	f("example.org", "example.org")
}

func TestProblemString(t *testing.T) {
	f := func(p translate.Problem, want string) {
		t.Helper()
		if got := p.String(); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
	f(translate.Problem{Kind: "CircuitBreaker", Namespace: "shop", Name: "payments", Source: "payments.yaml:1", Field: "spec.mode", Message: "wrong"},
		"CircuitBreaker shop/payments (payments.yaml:1): spec.mode: wrong")
	f(translate.Problem{Kind: "Service", Namespace: "shop", Name: "payments", Message: "wrong"},
		"Service shop/payments: wrong")
	f(translate.Problem{Kind: translate.KindFile, Name: "a.yaml", Source: "a.yaml:7", Message: "is not YAML"},
		"File a.yaml:7: is not YAML")
	f(translate.Problem{Kind: translate.KindFile, Name: "a.yaml", Source: "a.yaml", Message: "is empty"},
		"File a.yaml: is empty")
}

// FuzzBuild feeds objects with whatever YAML can make of their fields. The
// result means nothing; Build must come back, and twice with the same.
func FuzzBuild(f *testing.F) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil {
		f.Fatal(err)
	}
	for _, path := range files {
		ar, err := txtar.ParseFile(path)
		if err != nil {
			f.Fatal(err)
		}
		var all []string
		for _, file := range ar.Files {
			if strings.HasPrefix(file.Name, "input/") {
				all = append(all, string(file.Data))
			}
		}
		f.Add(strings.Join(all, "\n---\n"))
	}
	f.Fuzz(func(t *testing.T, documents string) {
		var objects translate.Objects
		for doc := range strings.SplitSeq(documents, "\n---\n") {
			loosely(&objects, []byte(doc))
		}
		m, problems, statuses := translate.Build(objects, translate.Options{})
		for _, s := range statuses {
			for _, c := range s.Conditions {
				if c.Reason == "" || c.Status == "False" && c.Message == "" {
					t.Errorf("a condition says too little: %#v", c)
				}
			}
		}
		for _, p := range problems {
			if p.Reason == "" || p.Message == "" || p.String() == "" {
				t.Errorf("a problem says too little: %#v", p)
			}
		}
		m2, problems2, statuses2 := translate.Build(objects, translate.Options{})
		if !reflect.DeepEqual(m, m2) || !reflect.DeepEqual(problems, problems2) || !reflect.DeepEqual(statuses, statuses2) {
			t.Error("the same objects gave two results")
		}
	})
}

// loosely decodes a document without any of the checks that a reader makes.
func loosely(o *translate.Objects, doc []byte) {
	var head struct{ Kind string }
	if yaml.Unmarshal(doc, &head) != nil {
		return
	}
	switch head.Kind {
	case "Namespace":
		decode(&o.Namespaces, doc)
	case "Pod":
		decode(&o.Pods, doc)
	case "GRPCRoute":
		decode(&o.GRPCRoutes, doc)
	case "ReferenceGrant":
		decode(&o.ReferenceGrants, doc)
	case "AuthorizationPolicy":
		decode(&o.AuthorizationPolicies, doc)
	case "Service":
		decode(&o.Services, doc)
	case "EndpointSlice":
		decode(&o.EndpointSlices, doc)
	case "HTTPRoute":
		decode(&o.HTTPRoutes, doc)
	case "TLSRoute":
		decode(&o.TLSRoutes, doc)
	case "Workload":
		decode(&o.Workloads, doc)
	case "CircuitBreaker":
		decode(&o.CircuitBreakers, doc)
	case "RetryPolicy":
		decode(&o.RetryPolicies, doc)
	}
}

func decode[T any](list *[]*T, doc []byte) {
	o := new(T)
	if yaml.Unmarshal(doc, o) == nil {
		*list = append(*list, o)
	}
}
