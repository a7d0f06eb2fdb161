// Package image makes container images of static programs, in memory, and writes
// them into one tar for containerd to import: there is neither a container
// runtime nor a registry to build and keep them.
package image

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"path"
	"slices"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Image says what an image consists of.
type Image struct {
	// Names it goes by, with tag.
	Names []string
	// Files by their path in the image, from files of this machine.
	Files map[string]string
	// Texts by their path in the image: small files.
	Texts      map[string]string
	Entrypoint []string
	Env        []string
	// User is a number; empty is root.
	User string
}

// Write makes the images and writes them into the tar file. Nothing is compressed:
// they travel by memory only.
func Write(file string, images ...Image) error {
	all := map[name.Tag]v1.Image{}
	for _, i := range images {
		img, err := i.build()
		if err != nil {
			return fmt.Errorf("image %s: %w", i.Names[0], err)
		}
		for _, n := range i.Names {
			tag, err := name.NewTag(n)
			if err != nil {
				return fmt.Errorf("image %s: %w", n, err)
			}
			all[tag] = img
		}
	}
	if err := tarball.MultiWriteToFile(file, all); err != nil {
		return fmt.Errorf("write images: %w", err)
	}
	return nil
}

func (i Image) build() (v1.Image, error) {
	content, err := i.tar()
	if err != nil {
		return nil, err
	}
	img, err := mutate.AppendLayers(mutate.MediaType(empty.Image, types.DockerManifestSchema2), static.NewLayer(content, types.DockerUncompressedLayer))
	if err != nil {
		return nil, fmt.Errorf("a layer: %w", err)
	}
	conf, err := img.ConfigFile()
	if err != nil {
		return nil, fmt.Errorf("the configuration: %w", err)
	}
	conf = conf.DeepCopy()
	conf.OS, conf.Architecture = "linux", "amd64"
	conf.Config = v1.Config{Entrypoint: i.Entrypoint, User: i.User, WorkingDir: "/", Env: append([]string{"PATH=/"}, i.Env...)}
	if img, err = mutate.ConfigFile(img, conf); err != nil {
		return nil, fmt.Errorf("the configuration: %w", err)
	}
	return img, nil
}

// tar is the one layer: the same for the same files, whenever it is made.
func (i Image) tar() ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	texts := map[string]string{
		"/etc/passwd": "root:x:0:0:root:/:/\nnonroot:x:65532:65532:nonroot:/:/\noutrigger:x:1337:1337:outrigger:/:/\n",
		"/etc/group":  "root:x:0:\nnonroot:x:65532:\noutrigger:x:1337:\n",
	}
	for p, t := range i.Texts {
		texts[p] = t
	}
	contents := map[string]func() ([]byte, error){}
	modes := map[string]int64{}
	for p, t := range texts {
		contents[p], modes[p] = func() ([]byte, error) { return []byte(t), nil }, 0o644
	}
	for p, f := range i.Files {
		contents[p], modes[p] = func() ([]byte, error) { return os.ReadFile(f) }, 0o755
	}
	folders := map[string]bool{"/": true}
	var paths []string
	for p := range contents {
		paths = append(paths, p)
	}
	slices.Sort(paths)
	epoch := time.Unix(0, 0)
	folder := func(dir string, mode int64) error {
		folders[dir] = true
		return w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir[1:] + "/", Mode: mode, ModTime: epoch})
	}
	if err := folder("/tmp", 0o1777); err != nil {
		return nil, fmt.Errorf("a layer: %w", err)
	}
	for _, p := range paths {
		var missing []string
		for dir := path.Dir(p); !folders[dir]; dir = path.Dir(dir) {
			missing = append(missing, dir)
		}
		slices.Reverse(missing)
		for _, dir := range missing {
			if err := folder(dir, 0o755); err != nil {
				return nil, fmt.Errorf("a layer: %w", err)
			}
		}
		text, err := contents[p]()
		if err != nil {
			return nil, fmt.Errorf("a file: %w", err)
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: p[1:], Mode: modes[p], Size: int64(len(text)), ModTime: epoch, Format: tar.FormatPAX}); err != nil {
			return nil, fmt.Errorf("a layer: %w", err)
		}
		if _, err := w.Write(text); err != nil {
			return nil, fmt.Errorf("a layer: %w", err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("a layer: %w", err)
	}
	return b.Bytes(), nil
}
