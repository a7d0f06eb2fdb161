package record_test

import (
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

func TestWorkload(t *testing.T) {
	f := func(pod, want string) {
		t.Helper()
		if got := record.Workload(pod); got != want {
			t.Errorf("Workload(%q) = %q; want %q", pod, got, want)
		}
	}
	f("payments-7d9c8b5f6d-x2vzq", "payments") // Deployment
	f("cart-db-0", "cart-db")                  // StatefulSet
	f("node-agent-x2vzq", "node-agent")        // DaemonSet
	f("payments", "payments")
	f("my-store", "my-store") // a word of five letters has vowels
	f("-", "-")
	f("", "")
}

func TestFieldsAreECS(t *testing.T) {
	r := record.Record{
		Time: time.Date(2026, 11, 23, 3, 0, 0, 5, time.UTC), Body: "card declined", Level: "warn", TraceID: "4bf92f3577b34da6a3ce929d0e0e4736",
		Resource:   &record.Resource{Namespace: "shop", Pod: "payments-0", Service: "payments", Labels: map[string]string{"app.kubernetes.io/name": "payments"}},
		Attributes: map[string]any{"http.response.status_code": float64(402)},
		Origin:     record.Origin{Path: "/var/log/pods/x/0.log", Offset: 12, End: 40},
	}
	f := r.Fields()
	for k, want := range map[string]any{
		"@timestamp": "2026-11-23T03:00:00.000000005Z", "message": "card declined", "log.level": "warn", "service.name": "payments",
		"kubernetes.labels.app_kubernetes_io_name": "payments", "http.response.status_code": float64(402), "log.offset": int64(12),
	} {
		if f[k] != want {
			t.Errorf("%s = %v (%T); want %v", k, f[k], f[k], want)
		}
	}
	r.Attributes["service.name"] = "checkout"
	if got := r.Fields()["service.name"]; got != "checkout" {
		t.Errorf("service.name = %v; what the program says of itself should win", got)
	}
}
