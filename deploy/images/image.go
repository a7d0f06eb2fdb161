package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// spec is an image to be made.
type spec struct {
	name, description string
	// programs by their path in the image; the first is the entrypoint.
	programs []executable
	// user and group of the processes, unless the pod says another.
	user int
	// optional: not made where its sources are not there.
	optional bool
}

type executable struct{ path, pkg string }

// The users of the images. proxy's traffic is told from the application's by it.
const (
	nonroot = 65532
	proxy   = 1337
)

// specs are all images of the project.
func specs() []spec {
	return []spec{
		{"sidecar", "The proxy beside each application, and what redirects the traffic to it", []executable{{"/sidecar", "./sidecar"}, {"/netinit", "./sidecar/netinit"}}, proxy, false},
		{"control-plane", "Configures the sidecars and signs their certificates", []executable{{"/control-plane", "./control-plane"}}, nonroot, false},
		{"injector", "The webhook that puts sidecars into pods", []executable{{"/injector", "./injector"}}, nonroot, false},
		{"collector", "Ships the logs and metrics of a node", []executable{{"/collector", "./collector"}}, nonroot, false},
		{"cli", "The command line", []executable{{"/outrigger", "./outrigger"}}, nonroot, false},
		{"cni", "The CNI plugin that redirects the traffic of meshed pods, and its installer", []executable{{"/outrigger-cni", "./sidecar/cni"}}, nonroot, true},
	}
}

// file is what a layer has of one path.
type file struct {
	path string
	mode int64
	body []byte // nil: a folder
}

// layer packs files. The same files are the same bytes: they are sorted, belong
// to root, and were all changed at epoch.
func layer(files []file, epoch time.Time) (v1.Layer, error) {
	all := slices.Clone(files)
	for _, f := range files {
		for i, c := range f.path {
			if folder := f.path[:i]; c == '/' && i > 0 && !slices.ContainsFunc(all, func(f file) bool { return f.path == folder }) {
				all = append(all, file{path: folder, mode: 0o755})
			}
		}
	}
	slices.SortFunc(all, func(a, b file) int { return strings.Compare(a.path, b.path) })
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range all {
		h := &tar.Header{Name: strings.TrimPrefix(f.path, "/"), Mode: f.mode, ModTime: epoch, Format: tar.FormatPAX, Typeflag: tar.TypeReg, Size: int64(len(f.body))}
		if f.body == nil {
			h.Name, h.Typeflag = h.Name+"/", tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, fmt.Errorf("pack %s: %w", f.path, err)
		}
		if _, err := w.Write(f.body); err != nil {
			return nil, fmt.Errorf("pack %s: %w", f.path, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("pack: %w", err)
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil }, tarball.WithMediaType(types.OCILayer))
}

// base is what a static program may look for: users, roots of trust, a place for
// temporary files.
func base(certificates []byte) []file {
	passwd := fmt.Sprintf("root:x:0:0:root:/:/sbin/nologin\nproxy:x:%d:%[1]d:proxy:/:/sbin/nologin\nnonroot:x:%d:%[2]d:nonroot:/:/sbin/nologin\n", proxy, nonroot)
	group := fmt.Sprintf("root:x:0:\nproxy:x:%d:\nnonroot:x:%d:\n", proxy, nonroot)
	out := []file{{"/etc/passwd", 0o644, []byte(passwd)}, {"/etc/group", 0o644, []byte(group)}, {"/tmp", 0o1777, nil}}
	if len(certificates) > 0 {
		out = append(out, file{"/etc/ssl/certs/ca-certificates.crt", 0o644, certificates})
	}
	return out
}

// build is what all images of one run have in common.
type build struct {
	version, revision string
	epoch             time.Time
	certificates      []byte
}

// make packs the binaries of s, named by paths on this machine in the order of
// s.programs, for one architecture.
func (b build) make(s spec, arch string, binaries []string) (v1.Image, error) {
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	add := func(by string, files ...file) error {
		l, err := layer(files, b.epoch)
		if err != nil {
			return err
		}
		image, err = mutate.Append(image, mutate.Addendum{Layer: l, MediaType: types.OCILayer, History: v1.History{Created: v1.Time{Time: b.epoch}, CreatedBy: by}})
		return err
	}
	if err := add("outrigger images: base", base(b.certificates)...); err != nil {
		return nil, err
	}
	for i, p := range s.programs {
		binary, err := os.ReadFile(binaries[i])
		if err != nil {
			return nil, err
		}
		if err := add("outrigger images: "+p.pkg, file{p.path, 0o755, binary}); err != nil {
			return nil, err
		}
	}
	config, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture, config.Created = "linux", arch, v1.Time{Time: b.epoch}
	config.Config = v1.Config{
		User: fmt.Sprintf("%d:%[1]d", s.user), Entrypoint: []string{s.programs[0].path}, WorkingDir: "/", Env: []string{"PATH=/"},
		Labels: b.labels(s),
	}
	return mutate.ConfigFile(image, config)
}

// labels are those of the OCI image specification's annotations.
func (b build) labels(s spec) map[string]string {
	l := map[string]string{
		"org.opencontainers.image.title":       "outrigger/" + s.name,
		"org.opencontainers.image.description": s.description,
		"org.opencontainers.image.version":     b.version,
		"org.opencontainers.image.created":     b.epoch.UTC().Format(time.RFC3339),
		"org.opencontainers.image.source":      "https://github.com/outrigger-mesh/outrigger",
		"org.opencontainers.image.vendor":      "Outrigger",
		"org.opencontainers.image.licenses":    "Apache-2.0",
	}
	if b.revision != "" {
		l["org.opencontainers.image.revision"] = b.revision
	}
	return l
}

// index joins the images of all architectures under one name.
func (b build) index(s spec, images map[string]v1.Image) v1.ImageIndex {
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, arch := range architectures {
		if image, ok := images[arch]; ok {
			index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: image, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}})
		}
	}
	return mutate.Annotations(index, b.labels(s)).(v1.ImageIndex)
}
