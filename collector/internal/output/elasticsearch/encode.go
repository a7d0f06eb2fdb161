package elasticsearch

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/klauspost/compress/gzip"

	"github.com/outrigger-mesh/outrigger/collector/internal/deflate"
	"github.com/outrigger-mesh/outrigger/collector/internal/output"
	"github.com/outrigger-mesh/outrigger/collector/internal/output/jsontext"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

const (
	// chunk of text that is collected before it is compressed. A record is never
	// split, so the buffer grows to the longest record.
	chunk = 32 << 10
	// maxKept is how much memory an encoder keeps of a batch that needed more.
	maxKept = 4 << 20
	// maxCached bounds what an encoder remembers: resources, file generations. A node
	// runs a few hundred containers; over it, all is forgotten and made again.
	maxCached = 2048
)

// Fields of the data stream scheme, and the one that takes attributes over
// Config.MaxFields.
const (
	dsType      = "data_stream.type"
	dsDataset   = "data_stream.dataset"
	dsNamespace = "data_stream.namespace"
	extra       = "outrigger.extra"
)

// shared is text that many documents have, and where the body has it last. It
// belongs to one encoder.
type shared struct {
	text []byte
	mark deflate.Mark
}

// span is a shared text among those of one document only: it stands before buf[at].
type span struct {
	at int
	*shared
}

// fragment is what a resource contributes to every record of it, written once.
type fragment struct {
	fields shared // ,"host.name":"..." and so on
	all    shared // the same with ,"service.name":"..." for records that name none themselves
	// names that fields holds; true for those that are plain values. parents are
	// the objects that they lie in.
	names   map[string]bool
	parents map[string]struct{}
	cluster string
	node    string
}

// newFragment writes the fields of a resource as record.Fields names them. With
// flattened the labels are one object under their own keys; otherwise each is a
// field whose key has underscores for dots and slashes.
func newFragment(r *record.Resource, flattened bool) *fragment {
	f := &fragment{names: map[string]bool{}, parents: map[string]struct{}{}}
	if r == nil {
		return f
	}
	f.cluster, f.node = r.Cluster, r.Node
	f.fields.text = f.describe(r, flattened)
	f.all.text = bytes.Clone(f.fields.text)
	if r.Service != "" {
		f.all.text = append(f.all.text, `,"`+record.ServiceName+`":`...)
		f.all.text = jsontext.AppendString(f.all.text, r.Service)
	}
	return f
}

// describe returns the fields but for the service's name, and notes their names.
func (f *fragment) describe(r *record.Resource, flattened bool) (b []byte) {
	bare := *r
	bare.Labels = nil
	fields := (&record.Record{Resource: &bare}).Fields()
	delete(fields, record.Timestamp)
	delete(fields, record.Message)
	delete(fields, record.ServiceName)
	add := func(name string, plain bool) {
		name = clean(name)
		f.names[name] = plain
		for p := range parents(name) {
			f.parents[p] = struct{}{}
		}
		b = append(b, ',')
		b = append(jsontext.AppendString(b, name), ':')
	}
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		add(name, true)
		text, _ := fields[name].(string) // all of them are
		b = jsontext.AppendString(b, text)
	}
	if len(r.Labels) == 0 {
		return b
	}
	const labels = "kubernetes.labels"
	if flattened {
		add(labels, false)
		for i, k := range slices.Sorted(maps.Keys(r.Labels)) {
			b = append(b, "{,"[min(i, 1)])
			// Flattened fields refuse NUL in keys.
			b = append(jsontext.AppendString(b, strings.ReplaceAll(k, "\x00", "_")), ':')
			b = jsontext.AppendString(b, r.Labels[k])
		}
		b = append(b, '}')
		return b
	}
	// Two keys may become one name: it then has both values.
	values := map[string][]string{}
	for _, k := range slices.Sorted(maps.Keys(r.Labels)) {
		name := clean(labels + "." + record.DedotKey(k))
		values[name] = append(values[name], r.Labels[k])
	}
	for _, name := range slices.Sorted(maps.Keys(values)) {
		add(name, true)
		v := values[name]
		if len(v) == 1 {
			b = jsontext.AppendString(b, v[0])
			continue
		}
		for i, text := range v {
			b = append(b, "[,"[min(i, 1)])
			b = jsontext.AppendString(b, text)
		}
		b = append(b, ']')
	}
	return b
}

type fragmentKey struct {
	resource  *record.Resource
	flattened bool
}

// encoder makes the body of bulk requests, one at a time, and keeps its memory and
// what it has learned of resources and files for the next.
type encoder struct {
	maxFields int
	fast      *deflate.Writer // for level 1: it is told what is shared
	zip       *gzip.Writer    // for the other levels; both are nil without compression
	out       bytes.Buffer    // the body
	buf       []byte          // text that is not in out yet, without that of spans
	spans     []span          // shared text among it, in order; none without fast
	sent      []int           // indices of the records in the body
	answer    bytes.Buffer    // to the request

	fragments map[fragmentKey]*fragment
	places    map[placeKey]*place
	frames    map[*stream]*frame
	clock     jsontext.Clock

	// Of the record before, which the next is likely to share.
	lastKey      fragmentKey
	lastFragment *fragment
	lastPlaceKey placeKey
	lastPlace    *place
	lastStream   *stream
	lastFrame    *frame

	names, parents, renamed []string // scratch of attributes
}

func newEncoder(compression string, level, maxFields int) (*encoder, error) {
	e := &encoder{maxFields: maxFields, fragments: map[fragmentKey]*fragment{}, places: map[placeKey]*place{}, frames: map[*stream]*frame{}}
	switch {
	case compression == "gzip" && level == 1:
		e.fast = deflate.NewWriter()
	case compression == "gzip":
		var err error
		if e.zip, err = gzip.NewWriterLevel(io.Discard, level); err != nil {
			return nil, fmt.Errorf("elasticsearch: compressionLevel: %w", err)
		}
	}
	return e, nil
}

// encode makes the body of a request with all records of the batch but those
// that JSON cannot hold, which are rejected. to says which stream a record goes to.
// The body is in e.out and the indices of what it holds in e.sent, until the next
// call.
func (e *encoder) encode(batch []*record.Record, to func(*record.Record) *stream) (rejected []output.Rejection) {
	e.out.Reset()
	e.buf, e.spans, e.sent = e.buf[:0], e.spans[:0], e.sent[:0]
	switch {
	case e.fast != nil:
		e.fast.Reset(e.out.AvailableBuffer())
	case e.zip != nil:
		e.zip.Reset(&e.out)
	}
	for i, r := range batch {
		before, spans := len(e.buf), len(e.spans)
		var err error
		if e.buf, err = e.append(e.buf, r, to(r)); err != nil {
			e.buf, e.spans = e.buf[:before], e.spans[:spans]
			rejected = append(rejected, output.Rejection{Index: i, Reason: "cannot be written as JSON: " + err.Error()})
			continue
		}
		e.sent = append(e.sent, i)
		if len(e.buf) >= chunk {
			e.flush()
		}
	}
	e.flush()
	switch {
	case e.fast != nil:
		e.out = *bytes.NewBuffer(e.fast.Close())
	case e.zip != nil:
		_ = e.zip.Close() // into memory, which never fails
	}
	return rejected
}

func (e *encoder) flush() {
	switch {
	case e.fast != nil:
		at := 0
		for _, s := range e.spans {
			e.fast.Write(e.buf[at:s.at])
			e.fast.Repeat(&s.mark, s.text)
			at = s.at
		}
		e.fast.Write(e.buf[at:])
	case e.zip != nil:
		_, _ = e.zip.Write(e.buf) // into memory, which never fails
	default:
		_, _ = e.out.Write(e.buf)
	}
	e.buf, e.spans = e.buf[:0], e.spans[:0]
}

// share appends a text that other documents have, too.
func (e *encoder) share(b []byte, s *shared) []byte {
	if e.fast == nil {
		return append(b, s.text...)
	}
	e.spans = append(e.spans, span{len(b), s})
	return b
}

// trim gives back memory that an unusual batch needed.
func (e *encoder) trim() {
	if cap(e.buf) > maxKept {
		e.buf = nil
	}
	if e.out.Cap() > maxKept {
		e.out = bytes.Buffer{}
	}
	if e.answer.Cap() > maxKept {
		e.answer = bytes.Buffer{}
	}
}

func (e *encoder) fragment(k fragmentKey) *fragment {
	if k == e.lastKey && e.lastFragment != nil {
		return e.lastFragment
	}
	f := e.fragments[k]
	if f == nil {
		if len(e.fragments) >= maxCached {
			clear(e.fragments)
		}
		f = newFragment(k.resource, k.flattened)
		e.fragments[k] = f
	}
	e.lastKey, e.lastFragment = k, f
	return f
}

func (e *encoder) place(k placeKey) *place {
	if e.lastPlace != nil && k == e.lastPlaceKey {
		return e.lastPlace
	}
	p := e.places[k]
	if p == nil {
		if len(e.places) >= maxCached {
			clear(e.places)
		}
		p = newPlace(k)
		e.places[k] = p
	}
	e.lastPlaceKey, e.lastPlace = k, p
	return p
}

// The times that a field of the type date_nanos can hold.
var firstTime, lastTime = time.Unix(0, 0).UTC(), time.Unix(0, math.MaxInt64).UTC()

// timestamp is the time of r, or when it was read where the index would refuse a
// record for its time: a program's clock must not cost its lines.
func timestamp(r *record.Record) time.Time {
	t := r.Time
	if t.Before(firstTime) || t.After(lastTime) {
		t = r.Observed
	}
	if t.Before(firstTime) {
		return firstTime
	}
	if t.After(lastTime) {
		return lastTime
	}
	return t
}

// frame is what the documents of a stream begin and end with.
type frame struct {
	action shared // {"create":{"_index":"..."
	fields shared // ,"data_stream.type":"logs" and so on; empty for an index
	end    shared // the same and }\n
}

func (e *encoder) frame(s *stream) *frame {
	if s == e.lastStream {
		return e.lastFrame
	}
	f := e.frames[s]
	if f == nil {
		if len(e.frames) >= maxCached {
			clear(e.frames)
		}
		f = &frame{action: shared{text: s.action}, fields: shared{text: s.fields}}
		f.end.text = append(bytes.Clone(s.fields), '}', '\n')
		e.frames[s] = f
	}
	e.lastStream, e.lastFrame = s, f
	return f
}

// append appends the two lines of a record: what to do and the document.
func (e *encoder) append(b []byte, r *record.Record, s *stream) ([]byte, error) {
	f, frame := e.fragment(fragmentKey{r.Resource, s.flattened}), e.frame(s)
	b = e.share(b, &frame.action)
	var p *place
	if r.Origin.File != "" || r.Origin.Path != "" {
		p = e.place(placeKey{r.Origin.File, r.Origin.Path, f.cluster, f.node})
	}
	// A record without a place gets an id from the server, and is stored twice if it
	// is sent twice.
	if r.Origin.File != "" {
		b = e.share(b, &p.id)
		b = appendOffset(b, r.Origin.Offset)
		b = append(b, '"')
	}
	b = append(b, "}}\n"+`{"@timestamp":"`...)
	b = e.clock.Append(b, timestamp(r))
	b = append(b, `","message":`...)
	b = jsontext.AppendString(b, r.Body)
	if r.Level != "" {
		b = jsontext.AppendString(append(b, `,"log.level":`...), r.Level)
	}
	if r.TraceID != "" {
		b = jsontext.AppendString(append(b, `,"trace.id":`...), r.TraceID)
	}
	if r.SpanID != "" {
		b = jsontext.AppendString(append(b, `,"span.id":`...), r.SpanID)
	}
	if r.Stream != "" {
		b = jsontext.AppendString(append(b, `,"stream":`...), r.Stream)
	}
	if r.Service != "" {
		b = e.share(b, &f.fields)
		b = jsontext.AppendString(append(b, `,"service.name":`...), r.Service)
	} else if _, said := r.Attributes[record.ServiceName]; said {
		b = e.share(b, &f.fields)
	} else {
		b = e.share(b, &f.all)
	}
	if r.Origin.Path != "" {
		b = e.share(b, &p.path)
		b = strconv.AppendInt(b, r.Origin.Offset, 10)
	}
	if r.TruncatedBytes > 0 {
		b = strconv.AppendInt(append(b, `,"log.truncated_bytes":`...), int64(r.TruncatedBytes), 10)
	}
	if len(r.Attributes) == 0 {
		return e.share(b, &frame.end), nil
	}
	b = e.share(b, &frame.fields)
	b, err := e.attributes(b, r, f, s)
	if err != nil {
		return b, err
	}
	return append(b, '}', '\n'), nil
}

// attributes appends the attributes of r that no field of ours overrides, in the
// order of their names, under names that make no document fail.
func (e *encoder) attributes(b []byte, r *record.Record, f *fragment, s *stream) ([]byte, error) {
	e.names, e.parents, e.renamed = e.names[:0], e.parents[:0], e.renamed[:0]
	for k := range r.Attributes {
		if overridden(k, r, f, s) {
			continue
		}
		e.names = append(e.names, k)
		for i := range len(k) { // as package parents does, without the closure
			if k[i] != '.' {
				continue
			}
			if v, ok := r.Attributes[k[:i]]; ok && !holdsObjects(v) {
				e.parents = append(e.parents, k[:i])
			}
		}
	}
	slices.Sort(e.names)
	within := e.names
	if len(within) > e.maxFields {
		within = within[:e.maxFields]
	}
	for _, k := range within {
		v := r.Attributes[k]
		name := e.name(k, v, f)
		b = append(b, ',')
		b = append(jsontext.AppendString(b, name), ':')
		var err error
		if b, err = appendValue(b, v, 1+strings.Count(name, ".")); err != nil {
			return b, fmt.Errorf("attribute %q: %w", k, err)
		}
	}
	if len(within) == len(e.names) {
		return b, nil
	}
	rest := make(map[string]any, len(e.names)-len(within))
	for _, k := range e.names[len(within):] {
		rest[k] = r.Attributes[k]
	}
	b = append(jsontext.AppendString(append(b, ','), e.unused(extra)), ':')
	b, err := appendAsText(b, rest)
	if err != nil {
		return b, fmt.Errorf("attributes over maxFields: %w", err)
	}
	return b, nil
}

// overridden reports whether record.Fields puts another value where the attribute
// k was.
func overridden(k string, r *record.Record, f *fragment, s *stream) bool {
	if r.Owns(k) {
		return true
	}
	switch k {
	case dsType, dsDataset, dsNamespace:
		return len(s.fields) > 0
	}
	_, ours := f.names[k]
	return ours
}

// name returns the name under which the attribute k is sent.
func (e *encoder) name(k string, v any, f *fragment) string {
	switch {
	case e.refused(k, v, f):
		return e.unused(moved + underscored(k))
	case !holdsObjects(v) && e.above(k, f):
		if name := k + ".value"; !e.taken(name) {
			return e.unused(name)
		}
		return e.unused(moved + underscored(k))
	}
	return k
}

// refused reports whether the attribute cannot have its name whatever the other
// attributes of the record are.
func (e *encoder) refused(k string, v any, f *fragment) bool {
	if _, reserved := metadata[k]; reserved || clean(k) != k {
		return true
	}
	for i := range len(k) {
		if k[i] != '.' {
			continue
		}
		if _, plain := scalars[k[:i]]; plain || f.names[k[:i]] {
			return true
		}
	}
	_, plain := scalars[k]
	return plain && isObject(v)
}

// underscored makes one part of a name.
func underscored(name string) string { return strings.ReplaceAll(clean(name), ".", "_") }

func isObject(v any) bool {
	switch v := v.(type) {
	case map[string]any:
		return true
	case []any:
		return slices.ContainsFunc(v, isObject)
	}
	return false
}

// above reports whether others use the name as an object.
func (e *encoder) above(k string, f *fragment) bool {
	if _, ok := objects[k]; ok {
		return true
	}
	if _, ok := f.parents[k]; ok {
		return true
	}
	return slices.Contains(e.parents, k)
}

// taken reports whether another attribute of the record has the name, or names
// below it.
func (e *encoder) taken(name string) bool {
	i, exact := slices.BinarySearch(e.names, name)
	if exact || slices.Contains(e.renamed, name) {
		return true
	}
	for _, n := range e.names[i:] {
		rest, ok := strings.CutPrefix(n, name)
		if !ok {
			return false
		}
		if rest[0] == '.' {
			return true
		}
	}
	return false
}

func (e *encoder) unused(name string) string {
	for e.taken(name) {
		name += "_"
	}
	e.renamed = append(e.renamed, name)
	return name
}
