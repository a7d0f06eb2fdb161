// Package chart is the Helm chart, and how it is rendered without Helm's
// programs.
//
// It knows values, their schema, templates and the order in which a cluster
// takes the objects. It calls no cluster: what the chart asks about one
// (Kubernetes' version, the API groups) is an argument. The command line
// installs what it renders; deploy/manifests is what it renders for each
// profile.
//
// The folder crds is a copy of deploy/crds, because Helm wants it here.
package chart

import (
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"

	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/loader/archive"
	v2 "helm.sh/helm/v4/pkg/chart/v2"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"
)

// Files are the chart's, as Helm wants them.
//
//go:embed Chart.yaml values.yaml values.schema.json all:templates crds
var Files embed.FS

// Name of the release; all names of objects are fixed, so there is one a cluster.
const Name = "outrigger"

// Labels that every object has, whoever installed it.
const (
	LabelPartOf    = "app.kubernetes.io/part-of"
	LabelManagedBy = "app.kubernetes.io/managed-by"
	LabelVersion   = "app.kubernetes.io/version"
	LabelComponent = "app.kubernetes.io/component"
)

// Options are what the chart asks about the release and the cluster.
type Options struct {
	// Namespace of the release.
	Namespace string
	// Version of the programs, which is also the default tag of their images. Empty:
	// the chart's own.
	Version string
	// KubeVersion such as v1.37.2.
	KubeVersion string
	// ManagedBy is the label app.kubernetes.io/managed-by; Helm where empty.
	ManagedBy string
	Upgrade   bool
}

// Release is the chart, rendered.
type Release struct {
	// CRDs in the order of their names.
	CRDs []*unstructured.Unstructured
	// Objects in the order in which a cluster takes them: see Order.
	Objects []*unstructured.Unstructured
	// Notes are for people, after the installation.
	Notes string
	// Version of the programs.
	Version string
}

// Load reads the chart. The error is that of a program built wrongly.
func Load() (*v2.Chart, error) {
	var files []*archive.BufferedFile
	err := fs.WalkDir(Files, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := Files.ReadFile(name)
		if err != nil {
			return err
		}
		files = append(files, &archive.BufferedFile{Name: name, Data: b})
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("the chart: %w", err)
	}
	c, err := loader.LoadFiles(files)
	if err != nil {
		return nil, fmt.Errorf("the chart: %w", err)
	}
	return c, nil
}

// Values reads a file of values.
func Values(b []byte) (map[string]any, error) { return loader.LoadValues(bytes.NewReader(b)) }

// Merge lays over over under; maps are merged, all else is replaced. Neither is changed.
func Merge(under, over map[string]any) map[string]any { return loader.MergeMaps(under, over) }

// Render validates values against their schema and renders the chart with them
// laid over its defaults. The error names the value that is wrong.
func Render(ctx context.Context, values map[string]any, o Options) (*Release, error) {
	c, err := Load()
	if err != nil {
		return nil, err
	}
	if o.Version != "" {
		c.Metadata.AppVersion = o.Version
	}
	kube, err := common.ParseKubeVersion(o.KubeVersion)
	if err != nil {
		return nil, fmt.Errorf("the version of Kubernetes %q: %w", o.KubeVersion, err)
	}
	caps := common.DefaultCapabilities.Copy()
	caps.KubeVersion = *kube
	release := common.ReleaseOptions{Name: Name, Namespace: o.Namespace, Revision: 1, IsInstall: !o.Upgrade, IsUpgrade: o.Upgrade}
	top, err := util.ToRenderValues(c, values, release, caps)
	if err != nil {
		return nil, explain(err)
	}
	if rel, ok := top["Release"].(map[string]any); ok && o.ManagedBy != "" {
		rel["Service"] = o.ManagedBy
	}
	rendered, err := engine.Engine{Strict: true}.RenderWithContext(ctx, c, top)
	if err != nil {
		return nil, fmt.Errorf("the chart with these values: %w", err)
	}
	r := &Release{Version: c.Metadata.AppVersion}
	for _, name := range slices.Sorted(maps.Keys(rendered)) {
		text := rendered[name]
		switch path.Ext(name) {
		case ".txt":
			r.Notes = text
		case ".yaml":
			objects, err := Decode([]byte(text))
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			r.Objects = append(r.Objects, objects...)
		}
	}
	slices.SortStableFunc(r.Objects, Order)
	for _, f := range c.CRDObjects() {
		objects, err := Decode(f.File.Data)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.Filename, err)
		}
		r.CRDs = append(r.CRDs, objects...)
	}
	return r, nil
}

// explain takes the words of the validator down to what is wrong and where.
func explain(err error) error {
	var lines []string
	for line := range strings.Lines(err.Error()) {
		if at, what, ok := strings.Cut(strings.TrimSpace(line), "': "); ok {
			at = strings.ReplaceAll(strings.Trim(strings.TrimPrefix(at, "- at '"), "/"), "/", ".")
			if at == "" {
				at = "the top"
			}
			lines = append(lines, at+": "+what)
		}
	}
	if len(lines) == 0 {
		return err
	}
	return fmt.Errorf("values: %s; values.schema.json says what may be written", strings.Join(lines, "; "))
}

// Decode reads the objects of a YAML stream. A key that is there twice is an error.
func Decode(b []byte) ([]*unstructured.Unstructured, error) {
	var out []*unstructured.Unstructured
	for r := utilyaml.NewDocumentDecoder(io.NopCloser(bytes.NewReader(b))); ; {
		doc, err := document(r)
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		var fields map[string]any
		if err := yaml.UnmarshalStrict(doc, &fields); err != nil {
			return nil, err
		}
		if len(fields) == 0 {
			continue // a comment, or a template that renders nothing
		}
		u := &unstructured.Unstructured{}
		j, err := yaml.YAMLToJSON(doc) // for int64, which unstructured content must have
		if err != nil {
			return nil, err
		}
		if err := u.UnmarshalJSON(j); err != nil {
			return nil, err
		}
		out = append(out, u)
	}
}

// maxDocument bounds one object; etcd takes no larger one.
const maxDocument = 3 << 20

func document(r io.Reader) ([]byte, error) {
	b := make([]byte, maxDocument)
	n, err := r.Read(b)
	return b[:n], err
}

// order: what others need comes first. The webhook is last, for until the
// injector answers it stands in the way of pods.
var order = []string{
	"Namespace", "CustomResourceDefinition", "ResourceQuota", "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding",
	"NetworkPolicy", "ConfigMap", "Service", "PodDisruptionBudget", "Deployment", "DaemonSet", "HorizontalPodAutoscaler", "PodMonitor",
	"MutatingWebhookConfiguration",
}

// Order compares two objects by when a cluster should get them: by kind, then
// by namespace and name. What order does not know comes before the webhook.
func Order(a, b *unstructured.Unstructured) int {
	rank := func(u *unstructured.Unstructured) int {
		if i := slices.Index(order, u.GetKind()); i >= 0 {
			return i
		}
		return len(order) - 2
	}
	if d := rank(a) - rank(b); d != 0 {
		return d
	}
	return strings.Compare(a.GetKind()+"/"+a.GetNamespace()+"/"+a.GetName(), b.GetKind()+"/"+b.GetNamespace()+"/"+b.GetName())
}
