package record

import (
	"log/slog"
	"strings"
)

// ECS gives slog's own fields their ECS names. It is a ReplaceAttr for
// slog.HandlerOptions, so that what our programs say of themselves is found
// beside what they carry.
func ECS(groups []string, a slog.Attr) slog.Attr {
	if len(groups) > 0 {
		return a
	}
	switch a.Key {
	case slog.TimeKey:
		a.Key = Timestamp
	case slog.LevelKey:
		a.Key, a.Value = LogLevel, slog.StringValue(strings.ToLower(a.Value.String()))
	case slog.MessageKey:
		a.Key = Message
	}
	return a
}
