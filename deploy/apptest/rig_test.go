package apptest

import (
	"net/http"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

const shippingService = `
apiVersion: v1
kind: Service
metadata: {name: shipping, namespace: shop}
spec:
  selector: {app: shipping}
  ports: [{name: http, port: 80, targetPort: http}]
`

// rig is the least that carries a request: one control plane, one service with
// two instances, one sidecar that calls it.
type rig struct {
	*controlPlane
	shipping *warehouse
	place    place
	url      string // the sidecar's ambassador port
	proxy    proxy
}

func newRig(t *testing.T, sidecarArguments ...string) *rig {
	t.Helper()
	r := &rig{shipping: newWarehouse(t)}
	r.controlPlane = startControlPlane(t, map[string]string{
		"service.yaml": shippingService, "workload.yaml": workload("shipping", r.shipping.addresses...),
	})
	upstream := freeAddress(t)
	r.url = "http://" + upstream
	r.place = place{dir: t.TempDir(), admin: freeAddress(t), config: bootstrap.Config{
		Namespace: "shop", Workload: "caller", Instance: "caller-0", ServiceAccount: "caller", ControlPlane: r.xds,
		Upstreams: []bootstrap.Upstream{{Service: "shipping", Namespace: "shop", Port: 80, Listen: listen(t, upstream)}},
	}}
	r.startSidecar(t, sidecarArguments...)
	eventually(t, 10*time.Second, func() string { return r.proxy.starting(t) })
	r.works(t, "at the start")
	return r
}

func (r *rig) startSidecar(t *testing.T, arguments ...string) {
	t.Helper()
	r.proxy = ourSidecar{arguments}.start(t, r.place)
}

// works fails the test where a request does not pass.
func (r *rig) works(t *testing.T, when string) {
	t.Helper()
	if a := call(http.MethodGet, r.url+"/ok"); a.status != http.StatusOK {
		t.Errorf("a request %s: %v", when, a)
	}
}
