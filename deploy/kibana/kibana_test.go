// Package kibana_test checks the shape of the saved objects. No Kibana runs here:
// whether one takes them is not tested, only what can be known of the file.
package kibana_test

import (
	"bufio"
	"encoding/json"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

type object struct {
	ID         string         `json:"id"`
	Type       string         `json:"type"`
	Attributes map[string]any `json:"attributes"`
	References []struct {
		ID   string `json:"id"`
		Name string `json:"name"`
		Type string `json:"type"`
	} `json:"references"`
	CoreMigrationVersion string `json:"coreMigrationVersion"`
	TypeMigrationVersion string `json:"typeMigrationVersion"`
}

func TestSavedObjects(t *testing.T) {
	file, err := os.Open("outrigger.ndjson")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := file.Close(); err != nil {
			t.Error(err)
		}
	}()
	known := writtenFields(t)
	types := map[string]string{}
	titles := map[string]bool{}
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		var o object
		dec := json.NewDecoder(strings.NewReader(lines.Text()))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&o); err != nil {
			t.Fatalf("%s: %v", lines.Text(), err)
		}
		if _, twice := types[o.ID]; twice || o.ID == "" || o.CoreMigrationVersion == "" || o.TypeMigrationVersion == "" {
			t.Errorf("%q: an id that is there already, or no versions", o.ID)
		}
		types[o.ID] = o.Type
		title, _ := o.Attributes["title"].(string)
		if title == "" || titles[title] {
			t.Errorf("%s: title %q is empty or there already", o.ID, title)
		}
		titles[title] = true
		switch o.Type {
		case "index-pattern":
			if title != "logs-outrigger*" || o.Attributes["timeFieldName"] != record.Timestamp {
				t.Errorf("data view %v", o.Attributes)
			}
			for _, name := range []string{"fields", "fieldAttrs", "fieldFormatMap", "runtimeFieldMap", "sourceFilters", "typeMeta"} {
				text, _ := o.Attributes[name].(string)
				if !json.Valid([]byte(text)) {
					t.Errorf("%s of the data view is not JSON in a string: %q", name, text)
				}
			}
		case "search":
			checkSearch(t, o, types, known)
		default:
			t.Errorf("%s: type %q", o.ID, o.Type)
		}
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"outrigger-logs", "outrigger-logs-errors", "outrigger-logs-breakers", "outrigger-logs-access", "outrigger-logs-failed", "outrigger-logs-slow"} {
		if types[id] == "" {
			t.Errorf("no %s: ids must not change, or an import makes a second object", id)
		}
	}
}

var fieldOfQuery = regexp.MustCompile(`([a-z_@.]+)\s*(?::|>=|<=|>|<)`)

func checkSearch(t *testing.T, o object, types map[string]string, known []string) {
	t.Helper()
	meta, _ := o.Attributes["kibanaSavedObjectMeta"].(map[string]any)
	text, _ := meta["searchSourceJSON"].(string)
	var source struct {
		Query struct {
			Query    string `json:"query"`
			Language string `json:"language"`
		} `json:"query"`
		Filter       []any  `json:"filter"`
		IndexRefName string `json:"indexRefName"`
	}
	if err := json.Unmarshal([]byte(text), &source); err != nil || source.Query.Language != "kuery" {
		t.Errorf("%s: search source %s: %v", o.ID, text, err)
	}
	if len(o.References) != 1 || o.References[0].Name != source.IndexRefName || types[o.References[0].ID] != "index-pattern" || o.References[0].Type != "index-pattern" {
		t.Errorf("%s: references %+v do not name the data view before it as %q", o.ID, o.References, source.IndexRefName)
	}
	var fields []string
	for _, m := range fieldOfQuery.FindAllStringSubmatch(source.Query.Query, -1) {
		fields = append(fields, m[1])
	}
	if len(fields) == 0 {
		t.Errorf("%s: no field in the query %q", o.ID, source.Query.Query)
	}
	columns, _ := o.Attributes["columns"].([]any)
	for _, c := range columns {
		name, _ := c.(string)
		fields = append(fields, name)
	}
	for _, f := range fields {
		if !slices.Contains(known, f) {
			t.Errorf("%s: nothing writes the field %q", o.ID, f)
		}
	}
}

// writtenFields are the names in package record and in the sidecar's log lines.
func writtenFields(t *testing.T) []string {
	t.Helper()
	names := []string{
		record.Timestamp, record.Message, record.LogLevel, record.TraceID, record.SpanID, record.ServiceName, record.ContainerName, record.HostName, record.Namespace, record.PodName,
		record.EventDataset,
	}
	quoted := regexp.MustCompile(`"([a-z_]+(?:\.[a-z_]+)+)"`)
	for _, path := range []string{"../../sidecar/internal/accesslog/line.go", "../../sidecar/events.go"} {
		source, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range quoted.FindAllSubmatch(source, -1) {
			names = append(names, string(m[1]))
		}
	}
	return names
}
