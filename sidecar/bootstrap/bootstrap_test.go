package bootstrap_test

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

func TestParseUpstream(t *testing.T) {
	u, err := bootstrap.ParseUpstream("payments.shop:80=127.0.0.1:4001")
	if err != nil {
		t.Fatal(err)
	}
	if u.Key() != "shop/payments:80" || u.Listen != netip.MustParseAddrPort("127.0.0.1:4001") {
		t.Fatalf("got %+v", u)
	}
	if u.String() != "payments.shop:80=127.0.0.1:4001" {
		t.Fatalf("String() = %q", u)
	}
	for _, bad := range []string{"", "payments", "payments.shop", "payments:80=127.0.0.1:1", "payments.shop:0=127.0.0.1:1", "payments.shop:80=localhost:1", "payments.shop:80=127.0.0.1", "a.b.c:80=127.0.0.1:1"} {
		if _, err := bootstrap.ParseUpstream(bad); err == nil || !strings.Contains(err.Error(), "payments.shop:80=127.0.0.1:4001") {
			t.Errorf("ParseUpstream(%q): %v; want an error with an example", bad, err)
		}
	}
}

func TestParseInbound(t *testing.T) {
	in, err := bootstrap.ParseInbound("tcp:127.0.0.1:5001=127.0.0.1:8080")
	if err != nil || in.Protocol != "tcp" || in.String() != "tcp:127.0.0.1:5001=127.0.0.1:8080" {
		t.Fatalf("got %+v, %v", in, err)
	}
	if in, err = bootstrap.ParseInbound("[::1]:5001=[::1]:8080"); err != nil || in.Protocol != "http" {
		t.Fatalf("got %+v, %v", in, err)
	}
	for _, p := range []string{"http", "tcp", "tls", "auto"} {
		if in, err = bootstrap.ParseInbound(p + ":[::1]:5001=[::1]:8080"); err != nil || in.Protocol != p || in.String() != p+":[::1]:5001=[::1]:8080" {
			t.Errorf("%s: got %+v, %v", p, in, err)
		}
	}
	for _, bad := range []string{"", "127.0.0.1:1", "udp:127.0.0.1:1=127.0.0.1:2", "127.0.0.1:1=127.0.0.1:1", "127.0.0.1:1=127.0.0.1:0"} {
		if _, err := bootstrap.ParseInbound(bad); err == nil {
			t.Errorf("ParseInbound(%q) was accepted", bad)
		}
	}
}

func valid() bootstrap.Config {
	return bootstrap.Config{
		Namespace: "shop", Workload: "storefront", Instance: "storefront-0", ServiceAccount: "storefront",
		ControlPlane: "127.0.0.1:15010",
		Upstreams:    []bootstrap.Upstream{{Service: "payments", Namespace: "shop", Port: 80, Listen: netip.MustParseAddrPort("127.0.0.1:4001")}},
		Inbounds:     []bootstrap.Inbound{{Protocol: "http", Listen: netip.MustParseAddrPort("127.0.0.1:5001"), Forward: netip.MustParseAddrPort("127.0.0.1:8080")}},
	}
}

func TestValidateNamesTheFlag(t *testing.T) {
	if err := valid().Validate(); err != nil {
		t.Fatal(err)
	}
	for want, spoil := range map[string]func(*bootstrap.Config){
		"--namespace":     func(c *bootstrap.Config) { c.Namespace = "Shop" },
		"--instance":      func(c *bootstrap.Config) { c.Instance = "" },
		"--control-plane": func(c *bootstrap.Config) { c.ControlPlane = "" },
		"both listen on":  func(c *bootstrap.Config) { c.Inbounds[0].Listen = c.Upstreams[0].Listen },
	} {
		c := valid()
		spoil(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Validate() = %v; want it to name %s", err, want)
		}
	}
}

func TestEnvoyBootstrapIsJSONWithTheNode(t *testing.T) {
	b, err := valid().Envoy("127.0.0.1:15000")
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Node struct {
			ID       string         `json:"id"`
			Metadata map[string]any `json:"metadata"`
		} `json:"node"`
	}
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	if got.Node.ID != "storefront-0.shop" || got.Node.Metadata[bootstrap.MetaUpstreams].([]any)[0] != "payments.shop:80=127.0.0.1:4001" {
		t.Fatalf("node = %+v", got.Node)
	}
}

// An Envoy that captures has all that it needs or is not written, and its admin
// interface never faces the network.
func TestEnvoyBootstrapOfAPodThatIsCaptured(t *testing.T) {
	pod := func() bootstrap.Config {
		c := valid()
		c.Upstreams, c.Inbounds = nil, nil
		c.Capture, c.Addresses = true, []netip.Addr{netip.MustParseAddr("10.1.0.1"), netip.MustParseAddr("fd00::1")}
		c.ControlPlane, c.ControlPlaneTLS = "outrigger-control-plane.outrigger-system:15012", true
		c.TrustDomain, c.SDS = "cluster.local", "unix:///var/run/outrigger/sds.sock"
		return c
	}
	b, err := pod().Envoy("127.0.0.1:15000")
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Node struct {
			Metadata map[string]any `json:"metadata"`
		} `json:"node"`
	}
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	if m := got.Node.Metadata; m[bootstrap.MetaCapture] != "true" || m[bootstrap.MetaAddresses].([]any)[1] != "fd00::1" {
		t.Errorf("metadata: %v", m)
	}
	for _, want := range []string{`"path": "/var/run/outrigger/sds.sock"`, `"exact": "spiffe://cluster.local/ns/outrigger-system/sa/control-plane"`, `"port_value": 15012`} {
		if !strings.Contains(string(b), want) {
			t.Errorf("%s is missing", want)
		}
	}
	for want, spoil := range map[string]func(*bootstrap.Config){
		"set SDS too":       func(c *bootstrap.Config) { c.SDS = "" },
		"set Addresses too": func(c *bootstrap.Config) { c.Addresses = nil },
	} {
		c := pod()
		spoil(&c)
		if _, err := c.Envoy("127.0.0.1:15000"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	for _, admin := range []string{"0.0.0.0:15000", "10.1.0.1:15000", "[::]:15000"} {
		if _, err := pod().Envoy(admin); err == nil || !strings.Contains(err.Error(), "not on loopback") {
			t.Errorf("%s: %v", admin, err)
		}
	}
}
