// Command images makes the container images without Docker: static binaries on
// an empty base, for linux/amd64 and linux/arm64.
//
// Of each image it writes an OCI layout with both architectures, and a tar for
// each that `docker load` and `ctr images import` take. The same sources,
// toolchain, certificates and SOURCE_DATE_EPOCH give the same bytes. It knows
// how programs are built and packed; what runs them is the chart's business.
package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/match"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/outrigger-mesh/outrigger/program"
)

func main() { program.Main("images", execute) }

var architectures = []string{"amd64", "arm64"}

// bundle is where Debian, Alpine and their kin keep the roots of trust.
const bundle = "/etc/ssl/certs/ca-certificates.crt"

type settings struct {
	build
	out, push string
	only      []string
	arch      []string
	insecure  bool
}

func parse(ctx context.Context, args []string, stderr io.Writer) (settings, error) {
	var s settings
	var only, arch, certificates string
	f := flag.NewFlagSet("images", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&s.version, "version", "", "version of the programs, and tag of the images (required)")
	f.StringVar(&s.out, "out", ".cache/images", "folder to write to; what is in the way there is replaced")
	f.StringVar(&only, "only", "", "comma list of images to make; empty: all")
	f.StringVar(&arch, "arch", strings.Join(architectures, ","), "comma list of architectures")
	f.StringVar(&certificates, "ca-bundle", bundle, "roots of trust to pack, in PEM; where this file does not exist images have none, and outputs over HTTPS need a caFile")
	f.StringVar(&s.push, "push", "", "registry and path to push to, for example registry.example.com/outrigger; empty: none. Credentials are Docker's")
	f.BoolVar(&s.insecure, "insecure", false, "push over HTTP where the registry has no HTTPS")
	if err := f.Parse(args); err != nil {
		return s, err
	}
	if f.NArg() > 0 {
		return s, fmt.Errorf("unexpected argument %q: settings are flags and begin with --, see --help", f.Arg(0))
	}
	if _, err := name.NewTag("outrigger/sidecar:" + s.version); s.version == "" || err != nil {
		return s, fmt.Errorf("--version %q cannot be the tag of an image: write letters, digits, '.', '_' and '-', for example v1.2.3", s.version)
	}
	s.arch = strings.Split(arch, ",")
	for _, a := range s.arch {
		if !slices.Contains(architectures, a) {
			return s, fmt.Errorf("--arch: %q is not one of %s", a, strings.Join(architectures, ", "))
		}
	}
	if only != "" {
		s.only = strings.Split(only, ",")
	}
	for _, o := range s.only {
		if !slices.ContainsFunc(specs(), func(s spec) bool { return s.name == o }) {
			return s, fmt.Errorf("--only: there is no image %q", o)
		}
	}
	var err error
	if s.epoch, err = epoch(ctx, os.Getenv("SOURCE_DATE_EPOCH")); err != nil {
		return s, err
	}
	s.revision = git(ctx, "rev-parse", "HEAD")
	s.certificates, err = os.ReadFile(certificates)
	if err != nil && (!errors.Is(err, os.ErrNotExist) || certificates != bundle) {
		return s, fmt.Errorf("--ca-bundle: %w", err)
	}
	return s, nil
}

// epoch is SOURCE_DATE_EPOCH (reproducible-builds.org), or else the time of the
// commit, or else 1970.
func epoch(ctx context.Context, env string) (time.Time, error) {
	if env == "" {
		env = git(ctx, "log", "-1", "--format=%ct")
	}
	if env == "" {
		env = "0"
	}
	n, err := strconv.ParseInt(env, 10, 64)
	if err != nil || n < 0 {
		return time.Time{}, fmt.Errorf("SOURCE_DATE_EPOCH %q is not a number of seconds since 1970", env)
	}
	return time.Unix(n, 0).UTC(), nil
}

// git asks git; empty where this is no checkout.
func git(ctx context.Context, args ...string) string {
	out, err := exec.CommandContext(ctx, "git", args...).Output()
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(out))
}

func execute(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	s, err := parse(ctx, args, stderr)
	if err != nil {
		return err
	}
	if len(s.certificates) == 0 {
		fmt.Fprintf(stderr, "images: there is no %s here: the images have no roots of trust\n", bundle)
	} else {
		fmt.Fprintf(stderr, "images: roots of trust with sha256 %.12x\n", sha256.Sum256(s.certificates))
	}
	todo, err := s.todo(ctx, stderr)
	if err != nil {
		return err
	}
	if err := s.compile(ctx, todo, stderr); err != nil {
		return err
	}
	var made []made
	for _, sp := range todo {
		m, err := s.write(ctx, sp)
		if err != nil {
			return fmt.Errorf("image %s: %w", sp.name, err)
		}
		made = append(made, m...)
	}
	return s.report(stdout, made)
}

// todo are the images asked for whose programs are there.
func (s settings) todo(ctx context.Context, stderr io.Writer) ([]spec, error) {
	var out []spec
	for _, sp := range specs() {
		if len(s.only) > 0 && !slices.Contains(s.only, sp.name) {
			continue
		}
		there := true
		for _, p := range sp.programs {
			b, err := exec.CommandContext(ctx, "go", "list", "-f", "{{.Name}}", p.pkg).CombinedOutput()
			if is := err == nil && strings.TrimSpace(string(b)) == "main"; !is && !sp.optional {
				return nil, fmt.Errorf("image %s: %s is not a program: %s", sp.name, p.pkg, b)
			} else if !is {
				fmt.Fprintf(stderr, "images: %s is not made: there is no %s\n", sp.name, p.pkg)
				there = false
			}
		}
		if there {
			out = append(out, sp)
		}
	}
	return out, nil
}

// binary is where a program of an architecture is built.
func (s settings) binary(arch, pkg string) string {
	return filepath.Join(s.out, "bin", arch, path.Base(pkg))
}

func (s settings) compile(ctx context.Context, todo []spec, stderr io.Writer) error {
	var pkgs []string
	for _, sp := range todo {
		for _, p := range sp.programs {
			pkgs = append(pkgs, p.pkg)
		}
	}
	for _, arch := range s.arch {
		started := time.Now()
		dir := filepath.Join(s.out, "bin", arch)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		// What git says of the tree is in the version; stamped by Go it would make
		// every commit another binary.
		args := append([]string{"build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -buildid= -X github.com/outrigger-mesh/outrigger/program.version=" + s.version, "-o", dir + string(filepath.Separator)}, pkgs...)
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch, "GOFLAGS=")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("go build for linux/%s: %w\n%s", arch, err, out)
		}
		fmt.Fprintf(stderr, "images: linux/%s built in %.0f s\n", arch, time.Since(started).Seconds())
	}
	return nil
}

// made is one image of one architecture.
type made struct {
	Reference string `json:"reference"`
	Platform  string `json:"platform"`
	Digest    string `json:"digest"`
	Tar       string `json:"tar"`
	// Bytes to pull, and of the binaries in it.
	Compressed int64 `json:"compressed"`
	Binaries   int64 `json:"binaries"`
}

// write packs an image for all architectures, writes and pushes it.
func (s settings) write(ctx context.Context, sp spec) ([]made, error) {
	tag, err := name.NewTag("outrigger/" + sp.name + ":" + s.version)
	if err != nil {
		return nil, err
	}
	var out []made
	images := map[string]v1.Image{}
	for _, arch := range s.arch {
		var binaries []string
		m := made{Reference: tag.String(), Platform: "linux/" + arch, Tar: filepath.Join(s.out, sp.name+"-"+arch+".tar")}
		for _, p := range sp.programs {
			b := s.binary(arch, p.pkg)
			info, err := os.Stat(b)
			if err != nil {
				return nil, err
			}
			m.Binaries += info.Size()
			binaries = append(binaries, b)
		}
		image, err := s.make(sp, arch, binaries)
		if err != nil {
			return nil, err
		}
		images[arch] = image
		if err := tarball.WriteToFile(m.Tar, tag, image); err != nil {
			return nil, err
		}
		if m.Compressed, m.Digest, err = measure(image); err != nil {
			return nil, err
		}
		out = append(out, m)
	}
	index := s.index(sp, images)
	if err := writeLayout(filepath.Join(s.out, sp.name), index, tag); err != nil {
		return nil, err
	}
	if s.push == "" {
		return out, nil
	}
	var options []name.Option
	if s.insecure {
		options = append(options, name.Insecure)
	}
	ref, err := name.NewTag(strings.TrimSuffix(s.push, "/")+"/"+sp.name+":"+s.version, options...)
	if err != nil {
		return nil, fmt.Errorf("--push %s: %w", s.push, err)
	}
	if err := remote.WriteIndex(ref, index, remote.WithContext(ctx), remote.WithAuthFromKeychain(authn.DefaultKeychain)); err != nil {
		return nil, fmt.Errorf("push %s: %w", ref, err)
	}
	return out, nil
}

func measure(image v1.Image) (size int64, digest string, err error) {
	m, err := image.Manifest()
	if err != nil {
		return 0, "", err
	}
	for _, l := range m.Layers {
		size += l.Size
	}
	d, err := image.Digest()
	return size, d.String(), err
}

// writeLayout writes an OCI image layout with one image, of several
// architectures, whose name is the tag.
func writeLayout(dir string, index v1.ImageIndex, tag name.Tag) error {
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	digest, err := index.Digest()
	if err != nil {
		return err
	}
	return p.ReplaceIndex(index, match.Digests(digest), layout.WithAnnotations(map[string]string{
		"org.opencontainers.image.ref.name": tag.TagStr(),
		"io.containerd.image.name":          tag.Name(),
	}))
}

// report says what was made and how large it is, and writes images.json for programs.
func (s settings) report(stdout io.Writer, all []made) error {
	w := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "image\tplatform\tbinaries\tto pull\tdigest")
	for _, m := range all {
		fmt.Fprintf(w, "%s\t%s\t%.1f MiB\t%.1f MiB\t%.19s\n", m.Reference, m.Platform, float64(m.Binaries)/(1<<20), float64(m.Compressed)/(1<<20), m.Digest)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	b, err := json.MarshalIndent(all, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(s.out, "images.json"), append(b, '\n'), 0o644)
}
