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
