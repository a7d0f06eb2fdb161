package translate_test

import (
	"encoding/json"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/manifests"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/translate"
)

// TestRandomObjects builds from the objects of two golden files together, in which
// fields at random hold anything that their types allow. Build must come back,
// with the same whatever the order, and say something for whatever it does not
// accept.
func TestRandomObjects(t *testing.T) {
	builds := 600
	if testing.Short() {
		builds = 100
	}
	corpus := goldenObjects(t)
	instances, routes, accepted, refused := 0, 0, 0, 0
	for seed := range builds {
		r := rand.New(rand.NewPCG(uint64(seed), 7))
		objects := alike(t, corpus[seed%len(corpus)], corpus[r.IntN(len(corpus))])
		mutate(r, reflect.ValueOf(&objects).Elem(), []float64{0, 0.003, 0.02, 0.1}[seed%4])
		unique(&objects)
		m, problems, statuses := translate.Build(objects, translate.Options{})
		shuffle(r, &objects)
		m2, problems2, statuses2 := translate.Build(objects, translate.Options{})
		if !reflect.DeepEqual(m, m2) || !reflect.DeepEqual(problems, problems2) || !reflect.DeepEqual(statuses, statuses2) {
			t.Errorf("seed %d: the result depends on the order of the objects:\n%s%s", seed, cmp.Diff(dump(m), dump(m2)), cmp.Diff(problems, problems2))
		}
		for _, p := range problems {
			if p.Reason == "" || p.Message == "" {
				t.Errorf("seed %d: a problem says too little: %#v", seed, p)
			}
		}
		instances += len(m.Instances)
		for _, s := range m.Services {
			for _, p := range s.Ports {
				routes += len(p.Routes)
			}
		}
		for _, s := range statuses {
			for _, c := range s.Conditions {
				switch {
				case c.Status == metav1.ConditionTrue:
					accepted++
				case c.Reason == "" || c.Message == "" || strings.ContainsRune(c.Reason, ' '):
					t.Errorf("seed %d: a condition says too little: %#v", seed, c)
				default:
					refused++
				}
			}
		}
	}
	t.Logf("%d builds: %d instances, %d routes, %d conditions true, %d false", builds, instances, routes, accepted, refused)
	if instances < builds/10 || routes < builds || accepted < builds || refused < builds {
		t.Error("what never gets past the names tests nothing: the objects are too random")
	}
}

func goldenObjects(t *testing.T) []translate.Objects {
	t.Helper()
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no golden files: %v", err)
	}
	var out []translate.Objects
	for _, path := range files {
		ar, err := txtar.ParseFile(path)
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		for _, f := range ar.Files {
			if name, ok := strings.CutPrefix(f.Name, "input/"); ok {
				if err := os.WriteFile(filepath.Join(dir, name), f.Data, 0o600); err != nil {
					t.Fatal(err)
				}
			}
		}
		objects, _ := manifests.New(dir, slog.New(slog.DiscardHandler)).Load()
		out = append(out, objects)
	}
	return out
}

// alike returns objects that share no memory with those given.
func alike(t *testing.T, in ...translate.Objects) translate.Objects {
	t.Helper()
	var out translate.Objects
	for _, o := range in {
		var one translate.Objects
		text, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(text, &one); err != nil {
			t.Fatal(err)
		}
		for i := range reflect.TypeFor[translate.Objects]().NumField() {
			list := reflect.ValueOf(&out).Elem().Field(i)
			list.Set(reflect.AppendSlice(list, reflect.ValueOf(one).Field(i)))
		}
	}
	return out
}

// unique leaves one object of each name: of two that differ in nothing that an
// order could be made of, which wins is not defined.
func unique(o *translate.Objects) {
	for i := range reflect.TypeFor[translate.Objects]().NumField() {
		list := reflect.ValueOf(o).Elem().Field(i)
		seen := map[[2]string]bool{}
		kept := reflect.MakeSlice(list.Type(), 0, list.Len())
		for j := range list.Len() {
			obj, ok := list.Index(j).Interface().(metav1.Object)
			if !ok || list.Index(j).IsNil() {
				kept = reflect.Append(kept, list.Index(j))
				continue
			}
			if k := [2]string{obj.GetNamespace(), obj.GetName()}; !seen[k] {
				seen[k] = true
				kept = reflect.Append(kept, list.Index(j))
			}
		}
		list.Set(kept)
	}
}

// mutate replaces parts of v, each with the given probability.
func mutate(r *rand.Rand, v reflect.Value, probability float64) {
	if v.CanSet() && r.Float64() < probability && v.Type() != reflect.TypeFor[translate.Objects]() {
		fill(r, v, 0)
		return
	}
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			mutate(r, v.Elem(), probability)
		}
	case reflect.Struct:
		for i := range v.NumField() {
			if f := v.Field(i); f.CanSet() {
				mutate(r, f, probability)
			}
		}
	case reflect.Slice:
		for i := range v.Len() {
			mutate(r, v.Index(i), probability)
		}
	case reflect.Map:
		for _, k := range v.MapKeys() {
			value := reflect.New(v.Type().Elem()).Elem()
			value.Set(v.MapIndex(k))
			mutate(r, value, probability)
			v.SetMapIndex(k, value)
		}
	default:
	}
}

// text is what strings are made of, likely and unlikely.
var text = []string{
	"", "shop", "payments", "http", "grpc", "tcp-x", "other", "a b", "*", "/", "/a", "/a/*", "//", "10.0.0.1", "10.1.0.2", "fd00::1", "nowhere",
	"Service", "HTTPRoute", "GRPCRoute", "Namespace", "Pod", "gateway.networking.k8s.io", "TCP", "UDP", "IPv4", "IPv6", "FQDN", "ExternalName", "None",
	"Exact", "PathPrefix", "RegularExpression", "(", "a.*", "GET", "get", "Allow", "Deny", "Observe", "Enforce", "strict", "off", "on", "0.5", "1s", "1.5s", "-1", "80", "8080",
	"RequestHeaderModifier", "RequestRedirect", "URLRewrite", "RequestMirror", "CORS", "ReplaceFullPath", "ReplacePrefixMatch", "https", "x-y", "Host",
	"spiffe://cluster.local/ns/shop/sa/web", "spiffe://*", "shop/web", "injected", "outrigger-proxy", "Always", "Failed", "5xx", "\x00", "\u00e9", strings.Repeat("a", 5000),
}

var (
	numbers = []int64{0, 1, 2, 80, 81, 100, 302, 8080, -1, 65535, 65536, 1 << 31}
	names   = []string{"app", "outrigger.dev/status", "outrigger.dev/mtls", "outrigger.dev/exclude-inbound-ports", "kubernetes.io/service-name", "outrigger.dev/source", ""}
)

// maxDepth bounds what is made: the types of Kubernetes are deep.
const maxDepth = 6

// fill sets v to something of its type.
func fill(r *rand.Rand, v reflect.Value, depth int) {
	if _, ok := v.Interface().(metav1.Time); ok {
		v.Set(reflect.ValueOf(metav1.NewTime(time.Unix(r.Int64N(3), r.Int64N(2)))))
		return
	}
	if depth > maxDepth {
		return
	}
	switch v.Kind() {
	case reflect.Pointer:
		if r.IntN(2) == 0 {
			v.SetZero()
			return
		}
		p := reflect.New(v.Type().Elem())
		fill(r, p.Elem(), depth+1)
		v.Set(p)
	case reflect.Struct:
		for i := range v.NumField() {
			if f := v.Field(i); f.CanSet() {
				fill(r, f, depth+1)
			}
		}
	case reflect.Slice:
		n := r.IntN(4)
		s := reflect.MakeSlice(v.Type(), n, n)
		for i := range n {
			fill(r, s.Index(i), depth+1)
		}
		v.Set(s)
	case reflect.Map:
		m := reflect.MakeMap(v.Type())
		for range r.IntN(4) {
			key, value := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
			key.SetString(names[r.IntN(len(names))])
			fill(r, value, depth+1)
			m.SetMapIndex(key, value)
		}
		v.Set(m)
	case reflect.String:
		v.SetString(text[r.IntN(len(text))])
	case reflect.Bool:
		v.SetBool(r.IntN(2) == 0)
	case reflect.Int, reflect.Int32, reflect.Int64:
		v.SetInt(int64(int32(numbers[r.IntN(len(numbers))])))
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(uint64(uint8(numbers[r.IntN(len(numbers))])))
	default:
	}
}
