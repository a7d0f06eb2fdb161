package admin_test

import (
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/admin"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/breaker"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/outlier"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/upstream"
)

// Two ports of one Service are two clusters: their gauges must not be taken for
// one another, which would fail the whole scrape.
func TestPortsOfAServiceHaveGaugesOfTheirOwn(t *testing.T) {
	clusters := upstream.New(func() string { return "e" }, func(breaker.Evidence) {}, func(string, outlier.Event) {})
	all := &table.Table{Clusters: map[string]*table.Cluster{}}
	for _, name := range []string{"shop/payments:80", "shop/payments:8080"} {
		all.Clusters[name] = &table.Cluster{Name: name, Limits: table.Limits{Requests: 7}, Breaker: &breaker.Policy{Name: "shop/p", ConsecutiveFailures: 5}}
		clusters.For(all, name)
	}
	r := prometheus.NewPedanticRegistry()
	r.MustRegister(admin.Gauges{Clusters: clusters})
	want := `
# HELP outrigger_breaker_state State of a breaker: 0 closed, 1 half-open, 2 open.
# TYPE outrigger_breaker_state gauge
outrigger_breaker_state{destination_port="80",destination_service="payments.shop.svc",mode="Enforce",policy="shop/p"} 0
outrigger_breaker_state{destination_port="8080",destination_service="payments.shop.svc",mode="Enforce",policy="shop/p"} 0
# HELP outrigger_limit_max The limit; absent where there is none.
# TYPE outrigger_limit_max gauge
outrigger_limit_max{destination_port="80",destination_service="payments.shop.svc",limit="requests"} 7
outrigger_limit_max{destination_port="8080",destination_service="payments.shop.svc",limit="requests"} 7
`
	if err := testutil.GatherAndCompare(r, strings.NewReader(want), "outrigger_breaker_state", "outrigger_limit_max"); err != nil {
		t.Fatal(err)
	}
}
