package authority_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/control-plane/identity/signing"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/authority"
)

// memory is a Store that needs no disk.
type memory struct {
	mu    sync.Mutex
	files authority.Files
}

func (m *memory) String() string { return "memory" }

func (m *memory) Load(context.Context) (authority.Files, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.files) == 0 {
		return nil, authority.ErrEmpty
	}
	return m.files, nil
}

func (m *memory) Create(_ context.Context, files authority.Files) (bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.files) > 0 {
		return false, nil
	}
	m.files = files
	return true, nil
}

func (m *memory) Replace(_ context.Context, _, next authority.Files) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.files = next
	return nil
}

// Between two steps some workloads have the certificates and roots of before and
// some those of after. Whichever two meet, they trust each other.
func TestNoStepOfARotationPartsWorkloads(t *testing.T) {
	store, c := &memory{}, &clock{}
	a := open(t, func(o *authority.Options) { o.Store, o.Now = store, c.now })
	type workload struct {
		chain, roots []*x509.Certificate
	}
	renew := func() workload {
		t.Helper()
		r, err := a.Sign(payments, csr(t, key(t), &x509.CertificateRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		return workload{r.Chain, r.Roots}
	}
	trusts := func(w, peer workload) error {
		pool := x509.NewCertPool()
		for _, r := range w.roots {
			pool.AddCert(r)
		}
		_, err := peer.chain[0].Verify(x509.VerifyOptions{Roots: pool, CurrentTime: c.now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
		return err
	}
	first := renew()
	before := first
	for round := range 2 { // and the next exchange finds things as the first did
		for _, want := range []authority.Step{authority.StepAdd, authority.StepSign, authority.StepRemove} {
			next, step, err := authority.Rotate(store.files, domain, authority.DefaultTTL, c.now())
			if err != nil || step != want {
				t.Fatalf("round %d: %s, %v; want %s", round, step, err, want)
			}
			untouched := maps.Clone(store.files)
			if _, _, err := authority.Rotate(store.files, domain, authority.DefaultTTL, c.now()); err != nil || len(untouched) != len(store.files) {
				t.Errorf("Rotate changed what it was given: %v", err)
			}
			store.files = next
			if _, err := a.Reload(t.Context()); err != nil {
				t.Fatalf("after %s: %v", step, err)
			}
			after := renew()
			if err := errors.Join(trusts(before, after), trusts(after, before), trusts(after, after)); err != nil {
				t.Errorf("around %s: %v", step, err)
			}
			if step == authority.StepRemove {
				break
			}
			if _, _, err := authority.Rotate(next, domain, authority.DefaultTTL, c.now().Add(authority.DefaultTTL)); !errors.Is(err, authority.ErrTooEarly) || !strings.Contains(err.Error(), "from 20") {
				t.Errorf("a step before every workload knows of %s: %v", step, err)
			}
			c.advance(authority.DefaultTTL + 10*time.Minute)
			before = renew()
		}
		if names := slices.Sorted(maps.Keys(store.files)); !slices.Equal(names, []string{"ca.crt", "ca.key", "root.crt", "token.key"}) {
			t.Errorf("left: %v", names)
		}
		before = renew()
	}
	if len(a.Roots()) != 1 || trusts(first, before) == nil {
		t.Errorf("after two exchanges the first root is still in use")
	}
}

// What cannot be exchanged is refused with the file and the remedy.
func TestRotationsAreChecked(t *testing.T) {
	store := &memory{}
	open(t, func(o *authority.Options) { o.Store = store })
	rotate := func(f authority.Files, now time.Time) (authority.Files, error) {
		next, _, err := authority.Rotate(f, domain, time.Hour, now)
		return next, err
	}
	now := time.Now()
	added, err := rotate(store.files, now)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := rotate(added, now.Add(2*time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	root, rootKey := newCA(t, "root", nil, nil, time.Hour, 1000*time.Hour)
	between, betweenKey := newCA(t, "between", root, rootKey, time.Hour, 1000*time.Hour)
	dir := t.TempDir()
	put(t, dir, betweenKey, []*x509.Certificate{between}, []*x509.Certificate{root})
	intermediate, err := authority.Folder(dir).Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	with := func(f authority.Files, name string, text []byte) authority.Files {
		f = maps.Clone(f)
		f[name] = text
		return f
	}
	for want, f := range map[string]authority.Files{
		"ca.key is missing":                 {"ca.crt": nil},
		"an intermediate, signed by":        intermediate,
		"rotated: parsing time":             with(store.files, "rotated", []byte("yesterday")),
		"nobody would trust it":             with(added, "root.crt", store.files["root.crt"]),
		"next.crt: it holds no certificate": with(added, "next.crt", nil),
		"old.crt: it is not PEM":            with(signed, "old.crt", []byte("x")),
		"old.crt is what signs now":         with(signed, "old.crt", added["next.crt"]),
	} {
		if _, err := rotate(f, now.Add(10*time.Hour)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q", err, want)
		}
	}
}

// A folder is replaced while others read it: what they read fits together at any
// time. Of two who replace at once one is told that it is late.
func TestFolderIsReplaced(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "authority")
	store := authority.Folder(dir)
	a := open(t, func(o *authority.Options) { o.Store = store })
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() {
		for {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			if _, err := a.Reload(context.WithoutCancel(t.Context())); err != nil {
				done <- err
				return
			}
		}
	}()
	for i := range 30 {
		old, err := store.Load(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		results := make([]error, 2)
		var wg sync.WaitGroup
		for j := range results {
			wg.Go(func() {
				next, _, err := authority.Rotate(old, domain, -time.Hour, time.Now().Add(time.Duration(j)*time.Second)) // at once
				if err == nil {
					err = store.Replace(t.Context(), old, next)
				}
				results[j] = err
			})
		}
		wg.Wait()
		late := 0
		for _, err := range results {
			switch {
			case errors.Is(err, authority.ErrChanged):
				late++
			case err != nil:
				t.Fatal(err)
			}
		}
		// The last step leaves nothing of its own behind, so that both may be right.
		if late != 1 && i%3 != 2 {
			t.Errorf("step %d: %d were late, want 1", i, late)
		}
	}
	close(stop)
	if err := <-done; err != nil {
		t.Errorf("a reader: %v", err)
	}
	for name, want := range map[string]os.FileMode{"ca.key": 0o600, "ca.crt": 0o644, "root.crt": 0o644} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*.new")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// A Secret that is mounted is read only and its files are links; it is used as it
// is.
func TestMountedIntermediate(t *testing.T) {
	root, rootKey := newCA(t, "root", nil, nil, time.Hour, 1000*time.Hour)
	between, betweenKey := newCA(t, "between", root, rootKey, time.Hour, 1000*time.Hour)
	dir := t.TempDir()
	data := filepath.Join(dir, "..2026")
	if err := os.Mkdir(data, 0o755); err != nil {
		t.Fatal(err)
	}
	put(t, data, betweenKey, []*x509.Certificate{between}, []*x509.Certificate{root})
	if err := os.Symlink("..2026", filepath.Join(dir, "..data")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ca.key", "ca.crt", "root.crt"} {
		if err := os.Symlink(filepath.Join("..data", name), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{dir, data} {
		if err := os.Chmod(d, 0o555); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := os.Chmod(d, 0o755); err != nil {
				t.Error(err)
			}
		})
	}
	a := open(t, func(o *authority.Options) { o.Store = authority.Folder(dir) })
	r, err := a.Sign(payments, csr(t, key(t), &x509.CertificateRequest{}))
	if err != nil || len(r.Chain) != 2 || !r.Chain[1].Equal(between) {
		t.Errorf("%d links, %v", len(r.Chain), err)
	}
	if got := string(a.Bundle()); got != string(signing.EncodeCertificates([]*x509.Certificate{root})) {
		t.Errorf("bundle %q", got)
	}
}

// A Store that fails keeps an authority from starting, not from going on; where
// somebody was faster, what that one made is used.
func TestStores(t *testing.T) {
	store := &flaky{memory: memory{}}
	store.fail = errors.New("no route to host")
	o := authority.Options{Store: store, TrustDomain: domain, Log: slog.New(slog.DiscardHandler)}
	if _, err := authority.Open(t.Context(), o); err == nil || !strings.Contains(err.Error(), "authority: memory: no route to host") || len(store.files) != 0 {
		t.Errorf("%v; %d files", err, len(store.files))
	}
	store.fail = nil
	a, err := authority.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	told := 0
	a.OnChange(func() { told++ })
	store.fail = errors.New("no route to host")
	if _, err := a.Reload(t.Context()); err == nil || len(a.Roots()) != 1 || told != 0 {
		t.Errorf("%v; %d roots; told %d times", err, len(a.Roots()), told)
	}
	big := authority.Files{"ca.key": make([]byte, authority.MaxFile+1), "ca.crt": nil, "root.crt": nil}
	if _, err := authority.Open(t.Context(), authority.Options{Store: &memory{files: big}, TrustDomain: domain}); err == nil || !strings.Contains(err.Error(), fmt.Sprint("at most ", authority.MaxFile)) {
		t.Errorf("%v", err)
	}
}

// flaky fails to load when told to.
type flaky struct {
	memory
	fail error
}

func (f *flaky) Load(ctx context.Context) (authority.Files, error) {
	if f.fail != nil {
		return nil, f.fail
	}
	return f.memory.Load(ctx)
}
