package patch

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// MaxDocument bounds one YAML document; etcd takes less.
const MaxDocument = 3 << 20

// YAML injects into every Pod, Deployment, StatefulSet, DaemonSet, ReplicaSet,
// ReplicationController, Job and CronJob of a multi-document YAML (or JSON)
// stream, and into those inside a List. A document that is not changed is
// returned byte for byte; a changed one is written anew, so its comments are
// gone, but no field that we do not know.
//
// The namespace of an object is its own metadata.namespace, else ns.Name; the
// labels are those of ns. There is a Decision for every object that could hold a
// pod, in the order of the stream. If any of them has an Err, or a document
// cannot be read, the error names all such objects and there is no output.
func YAML(in []byte, ns Namespace, s Settings) ([]byte, []Decision, error) {
	if err := s.Validate(); err != nil {
		return nil, nil, err
	}
	var out bytes.Buffer
	var all []Decision
	var errs []error
	for i, doc := range documents(in) {
		body, decisions, err := document(doc.body, ns, s)
		all = append(all, decisions...)
		if err != nil {
			errs = append(errs, fmt.Errorf("document %d: %w", i+1, err))
			continue
		}
		for _, d := range decisions {
			if d.Err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", d.Object, d.Err))
			}
		}
		out.Write(doc.separator)
		out.Write(body)
	}
	if len(errs) > 0 {
		return nil, all, errors.Join(errs...)
	}
	return out.Bytes(), all, nil
}

type yamlDocument struct{ separator, body []byte }

// documents splits at the document markers (YAML 1.2, section 9.1.2): "---" at
// the beginning of a line and followed by white space. What follows it on the
// same line belongs to the marker only if it is blank or a comment.
func documents(in []byte) []yamlDocument {
	docs := []yamlDocument{{}}
	begin := 0 // of the last document's body
	for at := 0; at < len(in); {
		line := in[at:]
		if i := bytes.IndexByte(line, '\n'); i >= 0 {
			line = line[:i+1]
		}
		at += len(line)
		rest, marker := bytes.CutPrefix(line, []byte("---"))
		rest = bytes.TrimSpace(rest)
		if marker && (len(rest) == 0 || rest[0] == '#' && (line[3] == ' ' || line[3] == '\t')) {
			docs = append(docs, yamlDocument{separator: line})
			begin = at
			continue
		}
		docs[len(docs)-1].body = in[begin:at]
	}
	return docs
}

func document(body []byte, ns Namespace, s Settings) ([]byte, []Decision, error) {
	if len(bytes.TrimSpace(body)) == 0 {
		return body, nil, nil
	}
	if len(body) > MaxDocument {
		return nil, nil, fmt.Errorf("it has %d bytes: at most %d", len(body), MaxDocument)
	}
	raw, err := yaml.YAMLToJSONStrict(body)
	if err != nil {
		return nil, nil, fmt.Errorf("it is not YAML: %w", err)
	}
	v, err := decodeJSON(raw)
	if err != nil {
		return nil, nil, err
	}
	object, ok := v.(map[string]any)
	if !ok {
		return body, nil, nil // a comment, a bare value: nothing of Kubernetes
	}
	decisions, changed, err := manifest(object, ns, s)
	if err != nil || !changed {
		return body, decisions, err
	}
	encoded, err := json.Marshal(object)
	if err != nil {
		return nil, decisions, err
	}
	text, err := yaml.JSONToYAML(encoded)
	return text, decisions, err
}

// manifest changes one object in place.
func manifest(object map[string]any, ns Namespace, s Settings) (decisions []Decision, changed bool, err error) {
	kind, _ := object["kind"].(string)
	group, _ := object["apiVersion"].(string)
	if items, ok := object["items"].([]any); ok && kind == "List" && group == "v1" {
		for i, item := range items {
			o, ok := item.(map[string]any)
			if !ok {
				continue
			}
			d, c, err := manifest(o, ns, s)
			decisions, changed = append(decisions, d...), changed || c
			if err != nil {
				return decisions, changed, fmt.Errorf("items[%d]: %w", i, err)
			}
		}
		return decisions, changed, nil
	}
	path, ok := podPath(group, kind)
	if !ok {
		return nil, false, nil
	}
	meta, _ := object["metadata"].(map[string]any)
	name, _ := meta["name"].(string)
	if name == "" {
		name, _ = meta["generateName"].(string)
	}
	if own, _ := meta["namespace"].(string); own != "" {
		ns.Name = own
	}
	title := kind + " " + name
	if ns.Name != "" {
		title = kind + " " + ns.Name + "/" + name
	}
	template := object
	for _, step := range path {
		next, ok := template[step].(map[string]any)
		if !ok {
			return nil, false, fmt.Errorf("%s: there is no pod template at %q", title, step)
		}
		template = next
	}
	decision, changed, err := injectTemplate(template, kind == "Pod", name, ns, s)
	if err != nil {
		return nil, false, fmt.Errorf("%s: %w", title, err)
	}
	decision.Object = title
	return []Decision{decision}, changed, nil
}

// podPath is where an object of a kind holds its pod.
func podPath(apiVersion, kind string) ([]string, bool) {
	switch apiVersion + " " + kind {
	case "v1 Pod":
		return nil, true
	case "apps/v1 Deployment", "apps/v1 StatefulSet", "apps/v1 DaemonSet", "apps/v1 ReplicaSet", "v1 ReplicationController", "batch/v1 Job":
		return []string{"spec", "template"}, true
	case "batch/v1 CronJob":
		return []string{"spec", "jobTemplate", "spec", "template"}, true
	default:
		return nil, false
	}
}

// injectTemplate patches a template as it was read, field by field, so that
// fields which our types do not know stay.
func injectTemplate(template map[string]any, isPod bool, owner string, ns Namespace, s Settings) (Decision, bool, error) {
	raw, err := json.Marshal(template)
	if err != nil {
		return Decision{}, false, err
	}
	pod := &corev1.Pod{}
	if err := json.Unmarshal(raw, pod); err != nil {
		return Decision{}, false, fmt.Errorf("its pod cannot be read: %w", err)
	}
	name := workload(pod)
	if !isPod {
		name = workload(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{GenerateName: owner}})
	}
	patched, decision := inject(pod, ns, s, name)
	ops, err := Diff(pod, patched)
	if err != nil {
		return decision, false, err
	}
	if string(ops) == "[]" {
		return decision, false, nil
	}
	_, err = apply(template, ops)
	return decision, true, err
}

// Diff is JSONPatch of two pods; what our types do not know of the pod that the
// patch is applied to stays as it is.
func Diff(original, patched *corev1.Pod) ([]byte, error) {
	a, err := json.Marshal(original)
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(patched)
	if err != nil {
		return nil, err
	}
	return JSONPatch(a, b)
}
