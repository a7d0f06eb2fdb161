package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/outrigger-mesh/outrigger/deploy/e2e/cluster"
	"github.com/outrigger-mesh/outrigger/deploy/e2e/image"
)

func (c config) testbed() string { return filepath.Join(c.root, ".cache", "testbed") }
func (c config) bin() string     { return filepath.Join(c.testbed(), "bin") }
func (c config) nft() string     { return filepath.Join(c.testbed(), "debian", "usr", "sbin") }
func (c config) images() string  { return filepath.Join(c.folder, "images.tar") }
func (c config) built() string   { return filepath.Join(c.folder, "bin") }

// prepare compiles what goes into the cluster, and makes images of it, outside:
// there is no network inside.
func prepare(ctx context.Context, c config) error {
	for _, name := range []string{"kubelet", "coredns", "containerd"} {
		if _, err := os.Stat(filepath.Join(c.bin(), name)); err != nil {
			return errors.New("the cluster's programs are not all in .cache/testbed/bin: run deploy/testbed/build.sh cluster (some 20 minutes, once)")
		}
	}
	if err := os.MkdirAll(c.built(), 0o755); err != nil {
		return fmt.Errorf("the folder of programs: %w", err)
	}
	product := []string{}
	for _, p := range []string{"control-plane", "sidecar", "sidecar/netinit", "injector", "collector", "outrigger", "deploy/demo/shop"} {
		if files, _ := filepath.Glob(filepath.Join(c.root, p, "main.go")); len(files) > 0 {
			product = append(product, "./"+p)
		}
	}
	if err := compile(ctx, c.root, c.built(), product...); err != nil {
		return err
	}
	own := filepath.Join(c.root, "deploy", "e2e")
	if err := compile(ctx, own, c.built(), "./app", "./pause", "./echo"); err != nil {
		return err
	}
	if c.only.MatchString("conformance") && !c.shell {
		if err := goTool(ctx, own, "test", "-c", "-o", filepath.Join(c.built(), "conformance.test"), "./conformance"); err != nil {
			return err
		}
	}
	if err := c.gatewayAPI(ctx); err != nil {
		return err
	}
	return c.pack()
}

// gatewayAPI writes the definitions of the Gateway API's kinds, of the version that
// the conformance tests are for, as its standard channel has them.
func (c config) gatewayAPI(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/gateway-api")
	cmd.Dir = filepath.Join(c.root, "deploy", "e2e")
	dir, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("where is the Gateway API: %w", err)
	}
	files, err := filepath.Glob(filepath.Join(strings.TrimSpace(string(dir)), "config", "crd", "standard", "gateway*.yaml"))
	if err != nil || len(files) == 0 {
		return fmt.Errorf("the Gateway API's definitions are not in its module %s: %w", dir, err)
	}
	var all []byte
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			return fmt.Errorf("the Gateway API: %w", err)
		}
		all = append(append(all, "\n---\n"...), text...)
	}
	if err := os.WriteFile(filepath.Join(c.folder, "gateway-api.yaml"), all, 0o644); err != nil {
		return fmt.Errorf("the Gateway API: %w", err)
	}
	return nil
}

func compile(ctx context.Context, dir, out string, packages ...string) error {
	return goTool(ctx, dir, append([]string{"build", "-trimpath", "-ldflags=-s -w -X github.com/outrigger-mesh/outrigger/program.version=here", "-o", out + "/"}, packages...)...)
}

func goTool(ctx context.Context, dir string, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s in %s: %w\n%s", strings.Join(args, " "), dir, err, text)
	}
	return nil
}

func (c config) pack() error {
	in := func(name string) string { return filepath.Join(c.built(), name) }
	one := func(image_, program, user string) image.Image {
		return image.Image{Names: []string{image_}, Files: map[string]string{"/" + program: in(program)}, Entrypoint: []string{"/" + program}, User: user}
	}
	images := []image.Image{
		one(cluster.PauseImage, "pause", "65532"),
		one("outrigger-e2e/app:here", "app", "65532"),
		one("outrigger-e2e/shop:here", "shop", "65532"),
		{Names: []string{cluster.CoreDNSImage}, Files: map[string]string{"/coredns": filepath.Join(c.bin(), "coredns")}, Entrypoint: []string{"/coredns"}},
	}
	images = append(images, image.Image{
		Names:      []string{"registry.k8s.io/gateway-api/echo-advanced:v1.5.1"},
		Files:      map[string]string{"/server": in("echo"), "/client": in("echo")},
		Entrypoint: []string{"/server"}, User: "65532",
	})
	for _, p := range []struct{ image, program, user string }{
		{"control-plane", "control-plane", "65532"}, {"injector", "injector", "65532"}, {"collector", "collector", "65532"}, {"cli", "outrigger", "65532"},
	} {
		images = append(images, one("outrigger/"+p.image+":here", p.program, p.user))
	}
	sidecar := one("outrigger/sidecar:here", "sidecar", "1337")
	if _, err := os.Stat(in("netinit")); err == nil {
		sidecar.Files["/netinit"] = in("netinit")
	}
	images = append(images, sidecar)
	if envoy, ok := c.envoy(); ok {
		images = append(images, envoy)
	}

	// Packing takes longer than looking whether anything has changed.
	sum, err := sumOf(images)
	if err != nil {
		return err
	}
	seal := c.images() + ".sum"
	if old, err := os.ReadFile(seal); err == nil && string(old) == sum {
		if _, err := os.Stat(c.images()); err == nil {
			return nil
		}
	}
	_ = os.Remove(seal) // an old seal must not stand for a tar that is half written
	if err := image.Write(c.images(), images...); err != nil {
		return err
	}
	if err := os.WriteFile(seal, []byte(sum), 0o644); err != nil {
		return fmt.Errorf("images: %w", err)
	}
	return nil
}

// envoy is a real Envoy with the libraries that it is linked to, if there is one: see
// deploy/apptest/envoy.sh.
func (c config) envoy() (image.Image, bool) {
	binary := filepath.Join(c.root, ".cache", "envoy", "envoy")
	if _, err := os.Stat(binary); err != nil {
		return image.Image{}, false
	}
	i := image.Image{Names: []string{"outrigger-e2e/envoy:here"}, Files: map[string]string{"/usr/local/bin/envoy": binary}, Entrypoint: []string{"/usr/local/bin/envoy"}, User: "1337", Env: []string{"PATH=/usr/local/bin"}}
	for _, lib := range []string{"libm.so.6", "librt.so.1", "libdl.so.2", "libpthread.so.0", "libc.so.6"} {
		i.Files["/lib/x86_64-linux-gnu/"+lib] = "/lib/x86_64-linux-gnu/" + lib
	}
	i.Files["/lib64/ld-linux-x86-64.so.2"] = "/lib64/ld-linux-x86-64.so.2"
	return i, true
}

func sumOf(images []image.Image) (string, error) {
	h := sha256.New()
	for _, i := range images {
		fmt.Fprintf(h, "%v %v %v %s\n", i.Names, i.Entrypoint, i.Env, i.User)
		var paths []string
		for p := range i.Files {
			paths = append(paths, p)
		}
		slices.Sort(paths)
		for _, p := range paths {
			f, err := os.Open(i.Files[p])
			if err != nil {
				return "", fmt.Errorf("an image's file: %w", err)
			}
			fmt.Fprintln(h, p)
			_, err = io.Copy(h, f)
			_ = f.Close()
			if err != nil {
				return "", fmt.Errorf("an image's file: %w", err)
			}
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
