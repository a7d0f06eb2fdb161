package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/outrigger-mesh/outrigger/injector/audit"
)

func TestAuditOfPodsIsATable(t *testing.T) {
	r := &audit.Report{Meshed: 40, Findings: []audit.Finding{
		{Namespace: "shop", Pod: "web-6b7f-x", Owner: "deployment/web", Cause: audit.Missed, Message: "nobody injected it", Command: "kubectl -n shop rollout restart deployment/web"},
		{Namespace: "shop", Pod: "y", Cause: audit.Outdated, Message: "it runs a\x1b[31mb", Command: "kubectl -n shop delete pod y"},
	}}
	show := func(quiet bool) string {
		t.Helper()
		var b strings.Builder
		if err := printPods(&b, r, quiet); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	want := `NAMESPACE  POD         CAUSE     MENDED BY
shop       web-6b7f-x  missed    kubectl -n shop rollout restart deployment/web
    nobody injected it
shop       y           outdated  kubectl -n shop delete pod y
    it runs ab

41 pods meshed, 1 should be and is not, 1 with an old sidecar, 0 disabled
`
	if diff := cmp.Diff(want, show(false)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if got := show(true); strings.Contains(got, "outdated") || !strings.Contains(got, "missed") {
		t.Errorf("quiet:\n%s", got)
	}
	r = &audit.Report{Meshed: 1}
	if got := show(false); got != "1 pod meshed, 0 should be and are not, 0 with an old sidecar, 0 disabled\n" {
		t.Errorf("all is well: %q", got)
	}
}

func TestAuditOfNoCluster(t *testing.T) {
	t.Setenv("KUBECONFIG", "/none")
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	if _, _, err := asked(t, nil, "", "audit"); err == nil || !strings.Contains(err.Error(), "give --kubeconfig") {
		t.Error(err)
	}
	if _, _, err := asked(t, nil, "", "audit", "--kubeconfig=/none/file"); err == nil || !strings.Contains(err.Error(), "/none/file") {
		t.Error(err)
	}
}
