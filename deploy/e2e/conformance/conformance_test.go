// Package conformance runs the Gateway API's own conformance tests for meshes, in
// the cluster that deploy/e2e has made.
package conformance

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"sigs.k8s.io/gateway-api/conformance"
	confv1 "sigs.k8s.io/gateway-api/conformance/apis/v1"
	"sigs.k8s.io/gateway-api/conformance/utils/suite"
	"sigs.k8s.io/gateway-api/pkg/features"
)

// TestConformance writes its report into the folder of the run.
func TestConformance(t *testing.T) {
	folder := os.Getenv("OUTRIGGER_E2E_FOLDER")
	if folder == "" {
		t.Skip("SKIPPED: not in the cluster that make e2e makes")
	}
	o := conformance.DefaultOptions(t)
	o.ConformanceProfiles = []suite.ConformanceProfileName{suite.MeshHTTPConformanceProfileName, suite.MeshGRPCConformanceProfileName}
	o.SupportedFeatures = []features.FeatureName{features.SupportMesh, features.SupportHTTPRoute, features.SupportGRPCRoute}
	for f := range features.MeshExtendedFeatures {
		o.SupportedFeatures = append(o.SupportedFeatures, f.Name)
	}
	// Of HTTPRoute, what the tests for meshes use.
	o.SupportedFeatures = append(o.SupportedFeatures,
		features.SupportHTTPRouteParentRefPort, features.SupportHTTPRouteResponseHeaderModification,
		features.SupportHTTPRoute303RedirectStatusCode, features.SupportHTTPRoute307RedirectStatusCode, features.SupportHTTPRoute308RedirectStatusCode)
	o.NamespaceLabels = map[string]string{"outrigger.dev/injection": "enabled"}
	o.ReportOutputPath = filepath.Join(folder, "conformance.yaml")
	o.Implementation = confv1.Implementation{
		Organization: "outrigger-mesh", Project: "outrigger", URL: "https://github.com/outrigger-mesh/outrigger",
		Version: os.Getenv("OUTRIGGER_VERSION"), Contact: []string{"https://github.com/outrigger-mesh/outrigger/issues"},
	}
	if o.Implementation.Version == "" {
		o.Implementation.Version = "dev"
	}
	// Every test by itself: two cores are shared by a whole cluster.
	o.DisableParallelTests = true
	o.TimeoutConfig.RequestTimeout = 20 * time.Second
	conformance.RunConformanceWithOptions(t, o)
}
