package journald

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Dataset of the records.
const Dataset = "journald"

// maxResources are remembered; a host has fewer units.
const maxResources = 512

// resources are those of the units, one pointer each.
type resources struct {
	cluster, node string
	known         map[[2]string]*record.Resource
}

func (s *resources) of(node, service string) *record.Resource {
	key := [2]string{node, service}
	if r := s.known[key]; r != nil {
		return r
	}
	if s.known == nil || len(s.known) >= maxResources {
		s.known = map[[2]string]*record.Resource{}
	}
	r := &record.Resource{Cluster: s.cluster, Node: node, Service: service}
	s.known[key] = r
	return r
}

// names of fields in the Elastic Common Schema, and whether they are numbers.
var names = map[string]struct {
	name   string
	number bool
}{
	"_SYSTEMD_UNIT": {"systemd.unit", false}, "_SYSTEMD_USER_UNIT": {"systemd.user_unit", false}, "_SYSTEMD_SLICE": {"systemd.slice", false}, "_SYSTEMD_CGROUP": {"systemd.cgroup", false},
	"_TRANSPORT": {"systemd.transport", false}, "MESSAGE_ID": {"systemd.message_id", false}, "UNIT": {"systemd.subject_unit", false},
	"_PID": {"process.pid", true}, "_COMM": {"process.name", false}, "_EXE": {"process.executable", false}, "_CMDLINE": {"process.command_line", false},
	"_UID": {"user.id", false}, "_GID": {"user.group.id", false}, "_BOOT_ID": {"host.boot.id", false}, "_MACHINE_ID": {"host.id", false},
	"SYSLOG_IDENTIFIER": {"log.syslog.appname", false}, "SYSLOG_FACILITY": {"log.syslog.facility.code", true}, "SYSLOG_PID": {"log.syslog.procid", false}, "PRIORITY": {"log.syslog.severity.code", true},
	"CODE_FILE": {"log.origin.file.name", false}, "CODE_LINE": {"log.origin.file.line", true}, "CODE_FUNC": {"log.origin.function", false}, "ERRNO": {"error.code", false},
	"CONTAINER_ID_FULL": {"container.id", false}, "CONTAINER_NAME": {"container.name", false},
}

// levels of PRIORITY (syslog's severities).
var levels = [...]string{"fatal", "fatal", "fatal", "error", "warn", "info", "info", "debug"}

// record returns the entry and its cursor. What is no entry is a record of the
// text as it is, and an error; the record is never nil.
func (s *resources) record(text []byte, now time.Time) (*record.Record, string, error) {
	now = now.UTC()
	var fields map[string]any
	if err := json.Unmarshal(text, &fields); err != nil || fields == nil {
		return &record.Record{Time: now, Observed: now, Body: string(text), Resource: s.of(s.node, ""), Attributes: map[string]any{record.EventDataset: Dataset}}, "", fmt.Errorf("an entry is not an object in JSON: %w", err)
	}
	r := &record.Record{Time: now, Observed: now}
	attributes := map[string]any{record.EventDataset: Dataset}
	values := make(map[string]string, len(fields))
	for k, v := range fields {
		value := field(v)
		values[k] = value
		switch n, known := names[k]; {
		case value == "":
		case known && n.number:
			if f, err := strconv.ParseUint(value, 10, 32); err == nil {
				attributes[n.name] = float64(f)
			} else {
				attributes["journald.custom."+strings.ToLower(k)] = value
			}
		case known:
			attributes[n.name] = value
		case k == "MESSAGE" || strings.HasPrefix(k, "_") || k == "SYSLOG_TIMESTAMP" || k == "SYSLOG_RAW":
		default:
			attributes["journald.custom."+strings.ToLower(k)] = value
		}
	}
	r.Body, r.Attributes = values["MESSAGE"], attributes
	for _, k := range []string{"_SOURCE_REALTIME_TIMESTAMP", "__REALTIME_TIMESTAMP"} {
		if us, err := strconv.ParseInt(values[k], 10, 64); err == nil && us > 0 {
			r.Time = time.UnixMicro(us).UTC()
			break
		}
	}
	if p, err := strconv.Atoi(values["PRIORITY"]); err == nil && p >= 0 && p < len(levels) {
		r.Level = levels[p]
	}
	service := strings.TrimSuffix(values["_SYSTEMD_UNIT"], ".service")
	for _, k := range []string{"SYSLOG_IDENTIFIER", "_COMM"} {
		if service == "" {
			service = values[k]
		}
	}
	node := values["_HOSTNAME"]
	if s.node != "" { // as in the records of the pods
		node = s.node
	}
	r.Resource = s.of(node, service)
	return r, values["__CURSOR"], nil
}

// field is a value as text. What is no UTF-8 comes as an array of bytes, a field
// that is there many times as an array of values.
func field(v any) string {
	switch v := v.(type) {
	case string:
		return v
	case []any:
		if b, ok := binary(v); ok {
			return string([]rune(string(b))) // each byte that is no UTF-8 becomes U+FFFD
		}
		parts := make([]string, 0, len(v))
		for _, x := range v {
			switch x := x.(type) {
			case string:
				parts = append(parts, x)
			case []any:
				if b, ok := binary(x); ok {
					parts = append(parts, string([]rune(string(b))))
				}
			default: // nothing that journalctl writes
			}
		}
		return strings.Join(parts, "\n")
	default: // null is an empty field
		return ""
	}
}

func binary(v []any) ([]byte, bool) {
	b := make([]byte, 0, len(v))
	for _, x := range v {
		f, ok := x.(float64)
		if !ok || f < 0 || f > 255 || f != float64(byte(f)) {
			return nil, false
		}
		b = append(b, byte(f))
	}
	return b, len(b) > 0
}
