package manifests

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	strictjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	"github.com/outrigger-mesh/outrigger/control-plane/api/v1alpha1"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/translate"
)

// identity is what no two objects may share.
type identity struct{ kind, namespace, name string }

// read is one object of a file.
type read struct {
	id     identity
	source string
	// addTo puts the object where its kind belongs.
	addTo func(*translate.Objects)
}

// parsed is what a file says.
type parsed struct {
	objects  []read
	problems []translate.Problem
	// blocking tells of each problem whether it keeps the file from replacing
	// its last good version; broken, whether any does.
	blocking []bool
	broken   bool
}

func (p *parsed) add(blocking bool, pr translate.Problem) {
	p.problems = append(p.problems, pr)
	p.blocking = append(p.blocking, blocking)
	p.broken = p.broken || blocking
}

// kind is one kind of object that is read.
type kind struct {
	name, apiVersion string
	// clusterWide objects are in no namespace.
	clusterWide bool
	// empty returns a pointer to a new object, and what adds it.
	empty func() (metav1.Object, func(*translate.Objects))
}

// newOf makes a kind's empty from the place of its objects.
func newOf[T any, P interface {
	*T
	metav1.Object
}](place func(*translate.Objects) *[]P) func() (metav1.Object, func(*translate.Objects)) {
	return func() (metav1.Object, func(*translate.Objects)) {
		o := P(new(T))
		return o, func(all *translate.Objects) {
			list := place(all)
			*list = append(*list, o)
		}
	}
}

// kinds are what may be in a file, as messages list them.
func kinds() []kind {
	return []kind{
		{"Namespace", "v1", true, newOf(func(o *translate.Objects) *[]*corev1.Namespace { return &o.Namespaces })},
		{"Service", "v1", false, newOf(func(o *translate.Objects) *[]*corev1.Service { return &o.Services })},
		{"Pod", "v1", false, newOf(func(o *translate.Objects) *[]*corev1.Pod { return &o.Pods })},
		{"EndpointSlice", "discovery.k8s.io/v1", false, newOf(func(o *translate.Objects) *[]*discoveryv1.EndpointSlice { return &o.EndpointSlices })},
		{"HTTPRoute", "gateway.networking.k8s.io/v1", false, newOf(func(o *translate.Objects) *[]*gatewayv1.HTTPRoute { return &o.HTTPRoutes })},
		{"GRPCRoute", "gateway.networking.k8s.io/v1", false, newOf(func(o *translate.Objects) *[]*gatewayv1.GRPCRoute { return &o.GRPCRoutes })},
		{"TLSRoute", "gateway.networking.k8s.io/v1", false, newOf(func(o *translate.Objects) *[]*gatewayv1.TLSRoute { return &o.TLSRoutes })},
		{"ReferenceGrant", "gateway.networking.k8s.io/v1", false, newOf(func(o *translate.Objects) *[]*gatewayv1.ReferenceGrant { return &o.ReferenceGrants })},
		{"ReferenceGrant", "gateway.networking.k8s.io/v1beta1", false, newOf(func(o *translate.Objects) *[]*gatewayv1.ReferenceGrant { return &o.ReferenceGrants })},
		{"Workload", v1alpha1.APIVersion, false, newOf(func(o *translate.Objects) *[]*v1alpha1.Workload { return &o.Workloads })},
		{"CircuitBreaker", v1alpha1.APIVersion, false, newOf(func(o *translate.Objects) *[]*v1alpha1.CircuitBreaker { return &o.CircuitBreakers })},
		{"RetryPolicy", v1alpha1.APIVersion, false, newOf(func(o *translate.Objects) *[]*v1alpha1.RetryPolicy { return &o.RetryPolicies })},
		{"AuthorizationPolicy", v1alpha1.APIVersion, false, newOf(func(o *translate.Objects) *[]*v1alpha1.AuthorizationPolicy { return &o.AuthorizationPolicies })},
	}
}

func supported() string {
	var out []string
	for _, k := range kinds() {
		out = append(out, k.name+" ("+k.apiVersion+")")
	}
	return strings.Join(out, ", ") + " and List"
}

// document is one document of a file, with the line of the file on which its
// text begins.
type document struct {
	text []byte
	line int
}

// parse reads a file. It never fails; what is wrong is in problems.
func parse(name string, data []byte) parsed {
	var out parsed
	data = bytes.TrimPrefix(data, []byte("\xef\xbb\xbf"))
	if strings.HasSuffix(strings.ToLower(name), ".json") {
		parseJSON(&out, name, data)
		return out
	}
	for _, doc := range split(data) {
		js, err := yaml.YAMLToJSONStrict(doc.text)
		if err != nil {
			line, message := yamlError(doc, err)
			out.add(true, fileProblem(name, line, "is not YAML: "+message))
			continue
		}
		out.document(name, doc, js)
	}
	return out
}

// parseJSON reads any number of JSON values one after the other.
func parseJSON(out *parsed, name string, data []byte) {
	dec := json.NewDecoder(bytes.NewReader(data))
	start := int64(0)
	for {
		var js json.RawMessage
		err := dec.Decode(&js)
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			offset := start
			var se *json.SyntaxError
			if errors.As(err, &se) {
				offset = min(max(se.Offset-1, 0), int64(len(data)))
			}
			out.add(true, fileProblem(name, 1+bytes.Count(data[:offset], []byte("\n")), "is not JSON: "+err.Error()))
			return
		}
		end := dec.InputOffset()
		begin := end - int64(len(js))
		out.document(name, document{text: data[begin:end], line: 1 + bytes.Count(data[:begin], []byte("\n"))}, js)
		start = end
	}
}

// split cuts a file into its documents. Lines that begin with --- or ... at
// the margin separate documents whatever surrounds them (YAML 1.2.2, 9.1.2).
func split(data []byte) []document {
	var out []document
	var text []byte
	begin, line := 1, 0
	flush := func() {
		if d, ok := trim(document{text, begin}); ok {
			out = append(out, d)
		}
		text = nil
	}
	for l := range bytes.Lines(data) {
		line++
		if marker, rest, ok := separator(l); ok {
			flush()
			begin = line
			if marker == "---" {
				// What follows on the line belongs to the document.
				text = append(append(text, "   "...), rest...)
			} else {
				text = append(text, '\n')
			}
			continue
		}
		text = append(text, l...)
	}
	flush()
	return out
}

func separator(l []byte) (marker string, rest []byte, ok bool) {
	for _, m := range []string{"---", "..."} {
		if rest, ok := bytes.CutPrefix(l, []byte(m)); ok && (len(rest) == 0 || bytes.ContainsRune([]byte(" \t\r\n"), rune(rest[0]))) {
			return m, rest, true
		}
	}
	return "", nil, false
}

// trim leaves out blank lines, comments and directives above the content, so
// that a document begins where its first field is. It reports whether there is
// any content.
func trim(d document) (document, bool) {
	for len(d.text) > 0 {
		l, rest, _ := bytes.Cut(d.text, []byte("\n"))
		if t := bytes.TrimSpace(l); len(t) > 0 && t[0] != '#' && l[0] != '%' {
			return d, true
		}
		d.text = rest
		d.line++
	}
	return d, false
}

var yamlLine = regexp.MustCompile(`^yaml: (?:unmarshal errors:\n +)?line (\d+): `)

// yamlError takes the line out of an error of the YAML package. Its parser
// counts lines from 0 and its scanner from 1; the parser is what does not find
// what it expects.
func yamlError(d document, err error) (line int, message string) {
	s := err.Error()
	m := yamlLine.FindStringSubmatch(s)
	if m == nil {
		return d.line, strings.TrimPrefix(s, "yaml: ")
	}
	message = strings.Join(strings.Fields(s[len(m[0]):]), " ")
	n, err := strconv.Atoi(m[1])
	if err != nil {
		return d.line, message
	}
	if strings.HasPrefix(message, "did not find expected") {
		n++
	}
	return d.line + n - 1, message
}

// head is what every object has.
type head struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Metadata   struct {
		Name      string `json:"name"`
		Namespace string `json:"namespace"`
	} `json:"metadata"`
	Items []json.RawMessage `json:"items"`
}

// maxListDepth bounds lists in lists, which nobody writes.
const maxListDepth = 4

// document reads one document, which may be a list.
func (p *parsed) document(name string, d document, js []byte) {
	p.value(name, d, js, "", 0)
}

// value reads one object. inherited is the apiVersion and kind that the items
// of a typed list have without saying so.
func (p *parsed) value(name string, d document, js []byte, inherited string, depth int) {
	var h head
	if err := strictjson.UnmarshalCaseSensitivePreserveInts(js, &h); err != nil {
		field, message := typeError(err)
		if bytes.Equal(bytes.TrimSpace(js), []byte("null")) || !bytes.HasPrefix(bytes.TrimSpace(js), []byte("{")) {
			field, message = "", "is not an object; write apiVersion, kind, metadata and spec"
		}
		pr := fileProblem(name, d.lineOf(field), message)
		pr.Field = field
		p.add(true, pr)
		return
	}
	if bytes.Equal(bytes.TrimSpace(js), []byte("null")) {
		return
	}
	if inherited != "" && h.Kind == "" && h.APIVersion == "" {
		h.APIVersion, h.Kind, _ = strings.Cut(inherited, " ")
	}
	item, isList := strings.CutSuffix(h.Kind, "List")
	if isList && (h.Kind == "List" || known(item, h.APIVersion) != nil) {
		if depth >= maxListDepth {
			p.add(true, fileProblem(name, d.line, fmt.Sprintf("lists are nested more than %d deep; unfold them", maxListDepth)))
			return
		}
		from := ""
		if item != "" {
			from = h.APIVersion + " " + item
		}
		docs := d.items(len(h.Items))
		for i, js := range h.Items {
			p.value(name, docs[i], js, from, depth+1)
		}
		return
	}

	namespace := h.Metadata.Namespace
	if namespace == "" {
		namespace = metav1.NamespaceDefault
	}
	pr := translate.Problem{
		Kind: h.Kind, Namespace: namespace, Name: h.Metadata.Name,
		Source: source(name, d.line), Reason: translate.ReasonInvalid,
	}
	problem := func(blocking bool, reason translate.Reason, field, format string, args ...any) {
		pr := pr
		pr.Field, pr.Reason, pr.Message = field, reason, fmt.Sprintf(format, args...)
		pr.Source = source(name, d.lineOf(field))
		p.add(blocking, pr)
	}

	if h.Kind == "" || h.APIVersion == "" {
		pr.Kind, pr.Namespace, pr.Name = translate.KindFile, "", name
		problem(true, translate.ReasonInvalid, "", "an object lacks apiVersion or kind; supported are %s", supported())
		return
	}
	k := known(h.Kind, h.APIVersion)
	if k == nil {
		// A folder may hold other objects, such as Deployments. One of our own
		// group is a typing error, and must not switch off what it was before.
		group, _, _ := strings.Cut(h.APIVersion, "/")
		for _, k := range kinds() {
			if k.name == h.Kind {
				problem(true, translate.ReasonUnsupported, "apiVersion", "%q is not supported for kind %s; write %s", h.APIVersion, h.Kind, k.apiVersion)
				return
			}
		}
		problem(group == v1alpha1.GroupName, translate.ReasonUnsupported, "kind", "%s (%s) is not supported and ignored; supported are %s", h.Kind, h.APIVersion, supported())
		return
	}

	if k.clusterWide {
		namespace, pr.Namespace = "", ""
	}
	obj, addTo := k.empty()
	strict, err := strictjson.UnmarshalStrict(js, obj)
	if err != nil {
		field, message := typeError(err)
		if field == "" {
			field, message = d.badValue(err)
		}
		problem(true, translate.ReasonInvalid, field, "%s", message)
		return
	}
	ok := true
	for _, err := range strict {
		ok = false
		var fe strictjson.FieldError
		if !errors.As(err, &fe) {
			problem(true, translate.ReasonInvalid, "", "%s", err)
			continue
		}
		if strings.HasPrefix(err.Error(), "duplicate") {
			problem(true, translate.ReasonInvalid, fe.FieldPath(), "is there twice; delete one")
			continue
		}
		remedy := "delete it or correct the name"
		if n := nearest(obj, fe.FieldPath()); n != "" {
			remedy = fmt.Sprintf("did you mean %s?", n)
		}
		problem(true, translate.ReasonInvalid, fe.FieldPath(), "unknown field; %s", remedy)
	}
	check := validation.IsDNS1123Subdomain
	if k.name == "Service" {
		check = validation.IsDNS1123Label
	}
	switch errs := check(obj.GetName()); {
	case obj.GetName() == "":
		ok = false
		problem(true, translate.ReasonInvalid, "metadata.name", "missing; name the object")
	case len(errs) > 0:
		ok = false
		problem(true, translate.ReasonInvalid, "metadata.name", "%q cannot be a name; %s", obj.GetName(), nameRemedy)
	}
	if errs := validation.IsDNS1123Label(namespace); !k.clusterWide && len(errs) > 0 {
		ok = false
		problem(true, translate.ReasonInvalid, "metadata.namespace", "%q is not a namespace; %s", namespace, nameRemedy)
	}
	if !ok {
		return
	}

	obj.SetNamespace(namespace)
	annotations := obj.GetAnnotations()
	if annotations == nil {
		annotations = map[string]string{}
	}
	annotations[translate.SourceAnnotation] = source(name, d.line)
	obj.SetAnnotations(annotations)
	p.objects = append(p.objects, read{
		id:     identity{k.name, namespace, obj.GetName()},
		source: source(name, d.line),
		addTo:  addTo,
	})
}

// nameRemedy says what RFC 1123 wants of names.
const nameRemedy = "write lower-case letters, digits and hyphens, beginning and ending with a letter or digit"

func known(name, apiVersion string) *kind {
	for _, k := range kinds() {
		if k.name == name && k.apiVersion == apiVersion {
			return &k
		}
	}
	return nil
}

var wrongType = regexp.MustCompile(`^json: cannot unmarshal (.+) into Go (?:struct field [^.\s]+\.(\S+)|value) of type (\S+)$`)

// typeError renders an error of the JSON decoder without its Go types.
func typeError(err error) (field, message string) {
	m := wrongType.FindStringSubmatch(err.Error())
	if m == nil {
		return "", err.Error()
	}
	want := "a map"
	switch t := m[3]; {
	case strings.HasPrefix(t, "[]"):
		want = "a list"
	case strings.HasPrefix(t, "map["):
		want = "a map"
	case t == "string":
		want = "text; write it in quotes"
	case t == "bool":
		want = "true or false"
	case strings.HasPrefix(t, "uint"):
		want = "a whole number, not negative"
	case strings.HasPrefix(t, "int"):
		want = "a whole number"
	case strings.HasPrefix(t, "float"):
		want = "a number"
	}
	got := m[1]
	switch got {
	case "object":
		got = "a map"
	case "array":
		got = "a list"
	case "string":
		got = "text"
	case "bool":
		got = "true or false"
	case "number":
		got = "a number"
	default:
		got = strings.TrimPrefix(got, "number ")
	}
	return m[2], fmt.Sprintf("is %s, where there must be %s", got, want)
}
