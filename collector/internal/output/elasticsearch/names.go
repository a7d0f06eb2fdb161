package elasticsearch

import (
	"iter"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

// What a log says of itself can clash with what Elasticsearch allows, with the
// names of the Elastic Common Schema and with itself. A clash would have the whole
// document refused, and by the first index that saw the other form, so names are
// moved, always in the same way, and no value is lost:
//
//   - a value whose name others use as an object ("host" beside "host.name", "a"
//     beside "a.b", "error" anywhere) goes to <name>.value;
//   - what cannot have its name at all goes to attributes.<name>, with underscores
//     for dots and for empty parts: a value below a name that is always plain
//     ("message.text"), a name that Elasticsearch keeps for itself ("_id"), one with
//     an empty part ("a..b") or with more than maxLevel parts;
//   - within an object that an attribute holds, names that clash or are refused
//     get underscores for dots.

// maxLevel of objects in each other: index.mapping.depth.limit is 20, and a
// moved name may take one more.
const maxLevel = 18

// moved is the object that takes what cannot stand under its own name.
const moved = "attributes."

func set(names ...string) map[string]struct{} {
	m := make(map[string]struct{}, len(names))
	for _, n := range names {
		m[n] = struct{}{}
	}
	return m
}

// objects are names that are objects in ECS and in what we send. A template
// built on ecs@mappings makes them objects with the first document that has one.
var objects = set("agent", "as", "attributes", "client", "cloud", "code_signature", "container", "data_stream", "destination", "device", "dll", "dns", "ecs", "email", "error",
	"event", "faas", "file", "geo", "group", "hash", "host", "http", "kubernetes", "log", "network", "observer", "orchestrator", "organization", "os", "outrigger", "package", "process",
	"registry", "related", "rule", "server", "service", "source", "span", "threat", "tls", "trace", "transaction", "url", "user", "user_agent", "vulnerability",
	"container.image", "http.request", "http.response", "kubernetes.container", "kubernetes.labels", "kubernetes.node", "kubernetes.pod", "log.file", "log.origin",
	"orchestrator.cluster", "orchestrator.resource", "process.thread", "service.node", "user_agent.os")

// scalars are names of plain values in every record.
var scalars = set(record.Timestamp, record.Message, record.LogLevel, record.TraceID, record.SpanID, record.ServiceName, record.ContainerName, record.HostName, record.Namespace,
	record.PodName, record.PodUID, record.PodIP, record.ContainerID, record.ImageName, record.KContainer, record.OrchNamespace, record.OrchCluster, record.StreamName,
	record.FilePath, record.FileOffset, record.TruncatedBytes, record.EventDataset, dsType, dsDataset, dsNamespace)

// metadata are names that Elasticsearch 8 and 9 keep for themselves at the top of
// a document, or that broke an index when a document brought them.
var metadata = set("_id", "_index", "_source", "_routing", "_seq_no", "_primary_term", "_version", "_ignored", "_ignored_source", "_field_names", "_doc_count", "_tier",
	"_nested_path", "_data_stream_timestamp", "_inference_fields", "_type", "_uid", "_size", "_feature", "_tsid", "_ts_routing_hash")

// parents yields the names of the objects that a dotted name lies in, outermost
// first.
func parents(name string) iter.Seq[string] {
	return func(yield func(string) bool) {
		for i := range len(name) {
			if name[i] == '.' && !yield(name[:i]) {
				return
			}
		}
	}
}

// clean returns the name with nothing in it that Elasticsearch refuses whatever
// else is in the document. Almost every name is returned as it is.
func clean(name string) string {
	dots, text, bad := 0, false, false // text: this part holds more than space
	for i := range len(name) {
		switch c := name[i]; {
		case c == '.':
			bad = bad || !text
			text = false
			dots++
		case c >= utf8.RuneSelf: // could be space of another kind
			bad = true
			text = true
		case c > ' ':
			text = true
		}
	}
	if !bad && text && dots < maxLevel {
		return name
	}
	parts := strings.Split(name, ".")
	for i, p := range parts {
		if strings.TrimFunc(p, unicode.IsSpace) == "" || strings.Trim(p, "\x00\x01\x02\x03\x04\x05\x06\x07\x08\x0e\x0f\x10\x11\x12\x13\x14\x15\x16\x17\x18\x19\x1a\x1b\x1c\x1d\x1e\x1f") == "" {
			parts[i] = "_"
		}
	}
	if len(parts) > maxLevel {
		return strings.Join(parts, "_")
	}
	return strings.Join(parts, ".")
}
