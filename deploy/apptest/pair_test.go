package apptest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// pair is the whole data path between two programs: the ambassador port of the
// caller's sidecar, the inbound port of the callee's, and the application that
// the test has brought.
//
//	caller -> caller's sidecar -> peer's sidecar -> application
type pair struct {
	*controlPlane
	address        string // the caller's ambassador port
	inbound        string // the port of the peer's sidecar
	caller, callee *runningSidecar
}

// peerService is a service whose one port speaks the protocol (appProtocol).
const peerService = `
apiVersion: v1
kind: Service
metadata: {name: peer, namespace: shop}
spec:
  selector: {app: peer}
  ports: [{name: port, port: 80, targetPort: http, appProtocol: %s}]
`

// newPair puts two sidecars between a caller and the application. With strict
// both take and give mutual TLS only, and a control plane with an authority
// vouches for them.
func newPair(t *testing.T, appProtocol, application string, strict bool) *pair {
	t.Helper()
	p := &pair{address: freeAddress(t), inbound: freeAddress(t)}
	peer := workload("peer", p.inbound)
	if strict {
		peer = takingOnlyTLS(peer)
	}
	files := map[string]string{"service.yaml": fmt.Sprintf(peerService, appProtocol), "workload.yaml": peer}
	var certified func(account string) []string
	p.controlPlane, certified = startAuthority(t, files, strict)
	start := func(name string, ups []bootstrap.Upstream, ins []bootstrap.Inbound) *runningSidecar {
		s, ok := ourSidecar{certified(name)}.start(t, place{dir: t.TempDir(), admin: freeAddress(t), config: bootstrap.Config{
			Namespace: "shop", Workload: name, Instance: name + "-0", ServiceAccount: name, ControlPlane: p.xds, Upstreams: ups, Inbounds: ins,
		}}).(*runningSidecar)
		if !ok {
			t.Fatal("our sidecar is not what it was")
		}
		return s
	}
	p.callee = start("peer", nil, []bootstrap.Inbound{{Protocol: "http", Listen: listen(t, p.inbound), Forward: listen(t, application)}})
	p.caller = start("caller", []bootstrap.Upstream{{Service: "peer", Namespace: "shop", Port: 80, Listen: listen(t, p.address)}}, nil)
	for _, s := range []*runningSidecar{p.caller, p.callee} {
		eventually(t, 10*time.Second, func() string { return s.starting(t) })
	}
	return p
}

// startAuthority is startControlPlane, and says what a sidecar must be told to
// be certified: nothing, unless strict. Then xds is the port with TLS.
func startAuthority(t *testing.T, files map[string]string, strict bool) (*controlPlane, func(account string) []string) {
	t.Helper()
	if !strict {
		return startControlPlane(t, files), func(string) []string { return nil }
	}
	authority, tls := filepath.Join(t.TempDir(), "authority"), freeAddress(t)
	c := &controlPlane{owner: t, mesh: t.TempDir(), xds: freeAddress(t), admin: freeAddress(t), arguments: []string{"--authority-dir", authority, "--xds-tls-address", tls}}
	for name, text := range files {
		c.put(t, name, text)
	}
	c.start(t)
	c.xds = tls // for the sidecars; it is not started again
	return c, func(account string) []string {
		token, err := exec.CommandContext(t.Context(), program("control-plane"), "--authority-dir", authority, "--join-token", "shop/"+account).Output()
		if err != nil {
			t.Fatalf("join token of %s: %v", account, err)
		}
		file := filepath.Join(t.TempDir(), "token")
		if err := os.WriteFile(file, token, 0o600); err != nil {
			t.Fatal(err)
		}
		return []string{"--control-plane-ca", filepath.Join(authority, "root.crt"), "--join-token-file", file, "--mtls", "strict"}
	}
}

// takingOnlyTLS makes a Workload take mutual TLS only.
func takingOnlyTLS(text string) string { return text + "  mtls: Strict\n" }

// again is this test program as another process, which does one job and leaves:
// for code that ends its process where it fails.
func again(t *testing.T, job string, arguments ...string) (output string, err error) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self)
	cmd.Env = append(os.Environ(), jobVariable+"="+job)
	cmd.Env = append(cmd.Env, arguments...)
	cmd.Dir = filepath.Dir(self)
	b, err := cmd.CombinedOutput()
	return string(b), err
}

// jobVariable names the job that a process started by again has.
const jobVariable = "APPTEST_JOB"
