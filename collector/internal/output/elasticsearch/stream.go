package elasticsearch

import (
	"context"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/internal/output/jsontext"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

const (
	// maxStreams bounds the data streams that one collector writes to: a log may
	// name any dataset, and each costs the cluster shards. Records of further
	// datasets go to the default one; they keep their event.dataset.
	maxStreams = 256
	// lookAgain is after how long a stream's mapping is looked at again: a rollover
	// may have brought the template into use, or ended it.
	lookAgain = time.Hour
	// ours begins the names of the data streams that our template is for.
	ours = "outrigger"
)

// stream is where records go, and what all of them begin and end with.
type stream struct {
	name      string
	action    []byte // {"create":{"_index":"..."
	fields    []byte // ,"data_stream.type":"logs" and so on; empty for an index
	flattened bool   // kubernetes.labels is one flattened object here
	looked    time.Time
}

func (o *Output) newStream(dataset string, flattened bool, now time.Time) *stream {
	s := &stream{flattened: flattened, looked: now}
	if *o.cfg.DataStream {
		s.name = streamName(dataset, o.cfg.Namespace)
		s.fields = append(s.fields, `,"`+dsType+`":"logs","`+dsDataset+`":`...)
		s.fields = append(jsontext.AppendString(s.fields, dataset), `,"`+dsNamespace+`":`...)
		s.fields = jsontext.AppendString(s.fields, o.cfg.Namespace)
	} else {
		s.name = o.cfg.Index
	}
	s.action = jsontext.AppendString([]byte(`{"create":{"_index":`), s.name)
	return s
}

func streamName(dataset, namespace string) string { return "logs-" + dataset + "-" + namespace }

// prepare makes the streams known that the batch goes to, before it is encoded:
// that may take a question to the server about the first record of a stream.
func (o *Output) prepare(ctx context.Context, batch []*record.Record, now time.Time) {
	o.know(ctx, "", now)
	if !*o.cfg.DataStream {
		return
	}
	for _, r := range batch {
		if raw, _ := r.Attributes[record.EventDataset].(string); raw != "" {
			o.know(ctx, raw, now)
		}
	}
}

// to returns the stream of a record that prepare has seen.
func (o *Output) to(r *record.Record) *stream {
	raw := ""
	if *o.cfg.DataStream && r.Attributes != nil {
		raw, _ = r.Attributes[record.EventDataset].(string)
	}
	o.streamsMu.RLock()
	defer o.streamsMu.RUnlock()
	if s := o.streams[raw]; s != nil {
		return s
	}
	return o.streams[""]
}

func (o *Output) know(ctx context.Context, raw string, now time.Time) {
	o.streamsMu.RLock()
	s, n := o.streams[raw], len(o.streams)
	o.streamsMu.RUnlock()
	if s != nil && (!o.mayFlatten(s.name) || now.Sub(s.looked) < lookAgain) {
		return
	}
	if s == nil && n >= maxStreams {
		if o.tooManyStreams.CompareAndSwap(false, true) {
			o.log.Warn("the logs name more datasets than one collector gives a data stream each; the others go to the default one and keep their event.dataset",
				"event.dataset", raw, "outrigger.limit", maxStreams, "data_stream.dataset", o.cfg.Dataset)
		}
		return
	}
	dataset := o.cfg.Dataset
	if raw != "" {
		if p := part(raw); p != "" {
			dataset = p
		}
	}
	fresh := o.newStream(dataset, false, now)
	switch {
	case o.cfg.Labels == labelsFlattened:
		fresh.flattened = true
	case o.mayFlatten(fresh.name):
		flattened, err := o.labelsFlattened(ctx, fresh.name)
		if err != nil { // ask again soon; until then as before, or the form that every mapping takes
			fresh.looked = now.Add(setupAgain - lookAgain)
			flattened = s != nil && s.flattened
			o.log.Debug("cannot see the mapping of a data stream; its labels are sent as fields", "data_stream", fresh.name, "error.message", err.Error())
		}
		fresh.flattened = flattened
	}
	o.streamsMu.Lock()
	o.streams[raw] = fresh
	o.streamsMu.Unlock()
}

// mayFlatten reports whether a stream is one that our template may be for.
func (o *Output) mayFlatten(name string) bool {
	return o.cfg.Labels == labelsAuto && o.cfg.Setup != setupOff && *o.cfg.DataStream && strings.HasPrefix(name, "logs-"+ours)
}
