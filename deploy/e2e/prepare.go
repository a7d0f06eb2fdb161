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
	own := []string{"./app", "./pause"}
	if err := compile(ctx, filepath.Join(c.root, "deploy", "e2e"), c.built(), own...); err != nil {
		return err
	}
	return c.pack()
}

func compile(ctx context.Context, dir, out string, packages ...string) error {
	args := append([]string{"build", "-trimpath", "-ldflags=-s -w", "-o", out + "/"}, packages...)
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
