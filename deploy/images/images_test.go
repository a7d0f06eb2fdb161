package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"io/fs"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

// written makes the sidecar's image of made-up binaries in a folder of its own.
func written(t *testing.T, change func(*settings)) (settings, []made) {
	t.Helper()
	s := settings{out: t.TempDir(), arch: architectures, build: build{version: "v1.2.3", revision: "abc", epoch: time.Unix(1700000000, 0).UTC(), certificates: []byte("-----BEGIN CERTIFICATE-----\n")}}
	if change != nil {
		change(&s)
	}
	sp := specs()[0]
	for _, arch := range s.arch {
		for _, p := range sp.programs {
			b := s.binary(arch, p.pkg)
			if err := os.MkdirAll(filepath.Dir(b), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(b, []byte(arch+p.path), 0o700); err != nil {
				t.Fatal(err)
			}
		}
	}
	m, err := s.write(t.Context(), sp)
	if err != nil {
		t.Fatal(err)
	}
	return s, m
}

// contents of a folder, by path, without the binaries that it was made of.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		rel, _ := filepath.Rel(dir, path)
		if !strings.HasPrefix(rel, "bin/") {
			out[rel] = string(b)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestTheSameInputsAreTheSameBytes(t *testing.T) {
	a, _ := written(t, nil)
	b, _ := written(t, nil)
	first, second := contents(t, a.out), contents(t, b.out)
	if len(first) < 8 {
		t.Errorf("there are %d files", len(first))
	}
	for path := range first {
		if first[path] != second[path] {
			t.Errorf("%s differs", path)
		}
	}
	if len(first) != len(second) {
		t.Errorf("%d files, then %d", len(first), len(second))
	}
	later, _ := written(t, func(s *settings) { s.epoch = s.epoch.Add(time.Second) })
	if contents(t, later.out)["sidecar-amd64.tar"] == first["sidecar-amd64.tar"] {
		t.Error("SOURCE_DATE_EPOCH has no effect")
	}
}

// What docker load and ctr images import read.
func TestTheTarIsAnImage(t *testing.T) {
	s, m := written(t, nil)
	for i, arch := range architectures {
		tag, err := name.NewTag("outrigger/sidecar:v1.2.3")
		if err != nil {
			t.Fatal(err)
		}
		image, err := tarball.ImageFromPath(m[i].Tar, &tag)
		if err != nil {
			t.Fatal(err)
		}
		if err := validate.Image(image); err != nil {
			t.Error(err)
		}
		config, err := image.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		if config.Architecture != arch || config.OS != "linux" || !config.Created.Equal(s.epoch) {
			t.Errorf("%s/%s of %s", config.OS, config.Architecture, config.Created)
		}
		c := config.Config
		if c.User != "1337:1337" || !cmp.Equal(c.Entrypoint, []string{"/sidecar"}) || c.Labels["org.opencontainers.image.version"] != "v1.2.3" || c.Labels["org.opencontainers.image.revision"] != "abc" {
			t.Errorf("config %+v", c)
		}
		got := map[string]string{}
		r := mutate.Extract(image)
		files := tar.NewReader(r)
		for {
			h, err := files.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(files)
			if err != nil {
				t.Fatal(err)
			}
			got[h.Name] = h.FileInfo().Mode().String() + " " + string(b)
			if h.Uid != 0 || h.Gid != 0 || !h.ModTime.Equal(s.epoch) {
				t.Errorf("%s belongs to %d:%d, of %s", h.Name, h.Uid, h.Gid, h.ModTime)
			}
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		for path, want := range map[string]string{
			"sidecar": "-rwxr-xr-x " + arch + "/sidecar", "netinit": "-rwxr-xr-x " + arch + "/netinit",
			"etc/ssl/certs/ca-certificates.crt": "-rw-r--r-- -----BEGIN CERTIFICATE-----\n",
		} {
			if got[path] != want {
				t.Errorf("%s: %q, want %q", path, got[path], want)
			}
		}
		if !strings.Contains(got["etc/passwd"], "proxy:x:1337:1337:") || !strings.HasPrefix(got["tmp/"]+got["tmp"], "dt") {
			t.Errorf("got %q", got)
		}
	}
}

func TestTheLayoutHasBothArchitectures(t *testing.T) {
	s, _ := written(t, nil)
	p, err := layout.FromPath(filepath.Join(s.out, "sidecar"))
	if err != nil {
		t.Fatal(err)
	}
	root, err := p.ImageIndex()
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(root); err != nil {
		t.Error(err)
	}
	m, err := root.IndexManifest()
	if err != nil || len(m.Manifests) != 1 || m.Manifests[0].Annotations["org.opencontainers.image.ref.name"] != "v1.2.3" {
		t.Fatalf("%v %+v", err, m)
	}
	index, err := root.ImageIndex(m.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	checkPlatforms(t, index)
}

func checkPlatforms(t *testing.T, index v1.ImageIndex) {
	t.Helper()
	m, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, d := range m.Manifests {
		got = append(got, d.Platform.String())
	}
	if d := cmp.Diff([]string{"linux/amd64", "linux/arm64"}, got); d != "" {
		t.Error(d)
	}
}

func TestPush(t *testing.T) {
	server := httptest.NewServer(registry.New())
	t.Cleanup(server.Close)
	host := strings.TrimPrefix(server.URL, "http://")
	_, m := written(t, func(s *settings) { s.push, s.insecure = host+"/mesh/", true })
	ref, err := name.NewTag(host+"/mesh/sidecar:v1.2.3", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	index, err := remote.Index(ref, remote.WithContext(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(index); err != nil {
		t.Error(err)
	}
	checkPlatforms(t, index)
	image, err := remote.Image(ref, remote.WithContext(t.Context()), remote.WithPlatform(v1.Platform{OS: "linux", Architecture: "arm64"}))
	if err != nil {
		t.Fatal(err)
	}
	if d, err := image.Digest(); err != nil || d.String() != m[1].Digest {
		t.Errorf("%v %v, want %s", d, err, m[1].Digest)
	}
}

// Two builds of the same sources, in two folders, for another architecture.
func TestBinariesAreReproducible(t *testing.T) {
	t.Chdir("../..")
	small := spec{name: "shop", programs: []executable{{"/shop", "./deploy/demo/shop"}}}
	var got [][]byte
	for range 2 {
		s := settings{build: build{version: "v1"}, out: t.TempDir(), arch: []string{"arm64"}}
		if err := s.compile(t.Context(), []spec{small}, io.Discard); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(s.binary("arm64", "./deploy/demo/shop"))
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, b)
	}
	if !bytes.Equal(got[0], got[1]) {
		t.Error("two builds differ")
	}
	if bytes.Contains(got[0], []byte(filepath.Dir(t.TempDir()))) {
		t.Error("the binary names folders of this machine")
	}
}

func TestWrongFlags(t *testing.T) {
	for args, want := range map[string]string{
		"":                                   "--version",
		"--version a+b":                      `"a+b"`,
		"--version v1 --arch mips":           `"mips"`,
		"--version v1 --only proxy":          `"proxy"`,
		"--version v1 --ca-bundle /no/where": "--ca-bundle",
		"--version v1 extra":                 `"extra"`,
	} {
		_, err := parse(t.Context(), strings.Fields(args), io.Discard)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", args, err)
		}
	}
	if _, err := epoch(t.Context(), "yesterday"); err == nil || !strings.Contains(err.Error(), `"yesterday"`) {
		t.Errorf("err = %v", err)
	}
}

func TestPushSaysWhichImageFailed(t *testing.T) {
	server := httptest.NewServer(registry.New())
	server.Close() // nobody listens any more
	s := settings{out: t.TempDir(), arch: []string{"amd64"}, push: strings.TrimPrefix(server.URL, "http://"), insecure: true, build: build{version: "v1"}}
	sp := spec{name: "cli", programs: []executable{{"/outrigger", "./outrigger"}}}
	b := s.binary("amd64", "./outrigger")
	if err := os.MkdirAll(filepath.Dir(b), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(b, []byte("x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := s.write(t.Context(), sp); err == nil || !strings.Contains(err.Error(), "push ") || !strings.Contains(err.Error(), "/cli:v1") {
		t.Errorf("err = %v", err)
	}
}
