package main

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
)

const twoOutputs = `{"time":"2026-11-23T03:00:00Z","outputs":[
 {"output":"local","kind":"store","breaker":"closed",
  "total":{"written":1300,"acknowledged":1100,"dropped":{"rejected":120,"too_long":30},"pending":50},
  "deleted":{"written":300,"acknowledged":300,"pending":0},
  "files":[{"file":"1-2-3","path":"/var/log/pods/shop_cart-0_u1/app/0.log","written":1000,"acknowledged":800,"dropped":{"rejected":120,"too_long":30},"pending":50}]},
 {"output":"es","kind":"elasticsearch","breaker":"open",
  "total":{"written":7,"acknowledged":0,"pending":7},"deleted":{"written":0,"acknowledged":0,"pending":0},
  "files":[{"file":"4","path":"/tmp/x.log","written":7,"acknowledged":0,"pending":7}]}]}`

func TestAuditIsATable(t *testing.T) {
	ledger := func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/api/v1/audit" {
			t.Errorf("asked %s", r.URL)
		}
		fmt.Fprint(w, twoOutputs)
	}
	out, _, err := asked(t, ledger, "", "logs", "audit")
	if err != nil {
		t.Fatal(err)
	}
	want := `output local (store, breaker closed), in bytes
  FILE                   WRITTEN  ACKNOWLEDGED  DROPPED  PENDING  CAUSES
  shop/cart-0/app/0.log     1000           800      150       50  rejected 120, too_long 30
  deleted files              300           300        0        0
  total                     1300          1100      150       50  rejected 120, too_long 30
  adds up

output es (elasticsearch, breaker open), in bytes
  FILE        WRITTEN  ACKNOWLEDGED  DROPPED  PENDING  CAUSES
  /tmp/x.log        7             0        0        7
  total             7             0        0        7
  adds up
`
	if out != want {
		t.Errorf("got\n%swant\n%s", out, want)
	}
	if out, _, err = asked(t, ledger, "", "logs", "audit", "-o", "json"); err != nil || out != twoOutputs {
		t.Errorf("-o json: %v\n%s", err, out)
	}
	if _, _, err = asked(t, ledger, "", "logs", "audit", "-o", "yaml"); err == nil || !strings.Contains(err.Error(), "write text or json") {
		t.Errorf("-o yaml: %v", err)
	}
}

// A byte that is on no side is an error, wherever it is missing.
func TestAuditDoesNotAddUp(t *testing.T) {
	f := func(from, to string, want string) {
		t.Helper()
		for _, format := range []string{"text", "json"} {
			out, _, err := asked(t, func(w http.ResponseWriter, _ *http.Request) {
				fmt.Fprint(w, strings.Replace(twoOutputs, from, to, 1))
			}, "", "logs", "audit", "-o", format)
			if err == nil || !strings.Contains(err.Error(), "local by "+want) {
				t.Errorf("%s for %s: err = %v", to, from, err)
			}
			if format == "text" && (!strings.Contains(out, "DOES NOT ADD UP: by "+want) || strings.Count(out, "  adds up\n") != 1) {
				t.Errorf("%s for %s:\n%s", to, from, out)
			}
		}
	}
	f(`"written":1300`, `"written":1301`, "1 bytes")                       // the total
	f(`"acknowledged":800`, `"acknowledged":790`, "10 bytes")              // a file
	f(`"deleted":{"written":300`, `"deleted":{"written":500`, "200 bytes") // what is gone
	f(`"pending":50},
  "deleted"`, `"pending":60},
  "deleted"`, "10 bytes")
}

func TestAuditWithoutLogs(t *testing.T) {
	out, _, err := asked(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"outputs":[]}`) }, "", "logs", "audit")
	if err != nil || !strings.Contains(out, "follows no logs") {
		t.Errorf("%v\n%s", err, out)
	}
}

const withRows = `{"outputs":[{"output":"es","kind":"elasticsearch","breaker":"closed",
  "total":{"written":100,"acknowledged":30,"dropped":{"rule":60},"pending":10,"records":2,"dropped_records":{"rule":3}},
  "deleted":{"written":100,"acknowledged":30,"dropped":{"rule":60},"pending":10},
  "rows":[
   {"owner":"shop/cart-0","hour":"2026-11-23T03:00:00Z","written":80,"acknowledged":30,"pending":50,"records":2},
   {"owner":"shop/web-0","hour":"2026-11-23T03:00:00Z","written":20,"acknowledged":0,"pending":20},
   {"owner":"shop/cart-0","hour":"2026-11-23T04:00:00Z","written":0,"acknowledged":0,"dropped":{"rule":60},"pending":-60,"dropped_records":{"rule":3}}]}]}`

func TestAuditByPodAndHour(t *testing.T) {
	collector := func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, withRows) }
	f := func(by, want string) {
		t.Helper()
		out, _, err := asked(t, collector, "", "logs", "audit", "--by", by)
		if err != nil || !strings.Contains(out, want) || !strings.HasSuffix(out, "  adds up\n") {
			t.Errorf("--by %s: %v, got\n%swant\n%s", by, err, out, want)
		}
	}
	f("pod", `
  POD          WRITTEN  ACKNOWLEDGED  DROPPED  PENDING  CAUSES
  shop/cart-0       80            30       60      -10  rule 60 in 3 records
  shop/web-0        20             0        0       20
  total            100            30       60       10  rule 60 in 3 records
`)
	f("namespace", "\n  shop           100            30       60       10  rule 60 in 3 records\n")
	f("hour", "\n  2026-11-23 04:00Z        0             0       60      -60  rule 60 in 3 records\n")
	if _, _, err := asked(t, collector, "", "logs", "audit", "--by", "node"); err == nil || !strings.Contains(err.Error(), "write file, namespace, pod, hour") {
		t.Errorf("--by node: %v", err)
	}
	// A row that is missing is seen.
	_, _, err := asked(t, func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, strings.Replace(withRows, `"written":20,"acknowledged":0,"pending":20`, `"written":10,"acknowledged":0,"pending":10`, 1))
	}, "", "logs", "audit")
	if err == nil || !strings.Contains(err.Error(), "es by 20 bytes") {
		t.Errorf("a row with 10 bytes too few: %v", err)
	}
}

func TestLogsWhy(t *testing.T) {
	collector := func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/api/v1/why" {
			t.Errorf("asked %s", r.URL)
		}
		fmt.Fprint(w, `{"since":{"es":"2026-11-01T02:00:00Z"},"reasons":[
 {"output":"es","namespace":"shop","pod":"cart-0","container":"app","cause":"rule","rule":"no-health","records":3,"bytes":60,"last":"2026-11-23T03:00:00Z","samples":["GET /healthz\u001b[2J"]},
 {"output":"es","namespace":"web","pod":"cart-1","container":"app","cause":"rejected","rule":"mapping","records":1,"bytes":9,"last":"2026-11-23T03:00:00Z","samples":[]},
 {"output":"es","namespace":"shop","pod":"silent-0","container":"app","cause":"rule","rule":"annotation outrigger.dev/logs: off","records":0,"bytes":0,"last":"2026-11-23T03:00:00Z","samples":[]}]}`)
	}
	out, _, err := asked(t, collector, "", "logs", "why", "cart", "-n", "shop")
	want := `Output es, since 2026-11-01T02:00:00Z:
shop/cart-0/app, output es: 3 records, 60 bytes, cause rule: no-health
  a rule or an annotation says that they are not to be sent; the last of 2026-11-23T03:00:00Z
  | GET /healthz`
	if err != nil || !strings.HasPrefix(out, want) || strings.ContainsRune(out, '\x1b') || strings.Contains(out, "web/") {
		t.Errorf("%v, got\n%swant\n%s", err, out, want)
	}
	out, _, err = asked(t, collector, "", "logs", "why", "silent")
	if err != nil || !strings.Contains(out, "\nshop/silent-0/app, output es: not read at all, cause rule: annotation outrigger.dev/logs: off\n") {
		t.Errorf("%v\n%s", err, out)
	}
	if out, _, err = asked(t, collector, "", "logs", "why", "other"); err != nil || !strings.Contains(out, "No rule, quota or rejection") {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestLogsCost(t *testing.T) {
	collector := func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/api/v1/cost" {
			t.Errorf("asked %s", r.URL)
		}
		fmt.Fprint(w, `{"since":"2026-11-23T03:00:00Z","until":"2026-11-23T04:00:00Z","lines":30,"bytes":3145728,"rows":[
 {"namespace":"shop","workload":"cart","lines":20,"bytes":2097152,"fields":40,"droppedLines":1,"droppedBytes":100,"share":0.6667,
  "templates":[{"pattern":"GET /cart/<*> 200","example":"GET /cart/7 200","match":"x","lines":18,"bytes":2000000,"share":0.9,"wouldSaveBytesPerDay":48000000}]},
 {"namespace":"web","workload":"front","lines":10,"bytes":1048576,"share":0.3333}]}`)
	}
	out, _, err := asked(t, collector, "", "logs", "cost", "-n", "shop")
	want := `30 lines, 3.0 MiB in 1h0m0s
  WORKLOAD    SHARE  LINES    BYTES  FIELDS         DROPPED
  shop/cart  66.7 %     20  2.0 MiB      40  1 lines, 100 B

shop/cart is mostly
  90.0 %  GET /cart/<*> 200
          dropping it would save 45.8 MiB a day; for example: GET /cart/7 200
`
	if err != nil || out != want {
		t.Errorf("%v, got\n%swant\n%s", err, out, want)
	}
}

func TestLogsReplay(t *testing.T) {
	left := 2048
	collector := func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost || r.URL.String() != "/api/v1/replay?output=es" || r.Header.Get("Content-Type") != "application/json" {
			t.Errorf("asked %s %s with %v", r.Method, r.URL, r.Header)
		}
		fmt.Fprintf(w, `{"bytes": %d}`, left)
		left = 0
	}
	for _, want := range []string{"2.0 KiB of dead letters are on their way", "has no dead letters"} {
		if out, _, err := asked(t, collector, "", "logs", "replay", "es"); err != nil || !strings.Contains(out, want) {
			t.Errorf("%v\n%s", err, out)
		}
	}
}
