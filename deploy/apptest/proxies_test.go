package apptest

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// dataPlane is a kind of proxy that the control plane drives.
type dataPlane interface {
	name() string
	// start runs a proxy for the place until the test ends.
	start(t *testing.T, p place) proxy
}

// place is a workload's proxy: what it is told at birth, and where its
// operator finds it.
type place struct {
	dir    string // for files of its own
	config bootstrap.Config
	admin  string
}

// proxy is one that runs, as its operator sees it.
type proxy interface {
	process() *process
	// starting says why it is not ready, or that something that it was told has
	// not taken effect; empty when all has.
	starting(t *testing.T) string
	// ejected counts the endpoints of a service that outlier detection has
	// taken out.
	ejected(t *testing.T, service string) int
	// overflow counts the requests to a service that a limit has rejected.
	overflow(t *testing.T, service string) int
	// refused says what of its configuration it has refused, if anything.
	refused(t *testing.T) string
}

// record is a line of an access log. Both kinds of proxy give these fields the
// same names, so that one search finds both.
type record struct {
	Dataset  string `json:"event.dataset"`
	Path     string `json:"url.path"`
	Status   int    `json:"http.response.status_code"`
	Flags    string `json:"outrigger.response_flags"`
	Attempts int    `json:"outrigger.attempts"`
	Route    string `json:"outrigger.route"`
	Upstream string `json:"destination.address"`
	Duration int64  `json:"event.duration"`
}

// accessLog returns the records of requests whose path begins with prefix that
// came after the mark.
func accessLog(t *testing.T, p *process, mark int, prefix string) []record {
	t.Helper()
	var out []record
	for line := range strings.Lines(string(p.stdout.from(mark))) {
		var r record
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Errorf("%s wrote a line that is no record: %v: %s", p.name, err, line)
			continue
		}
		if r.Dataset == "outrigger.access" && strings.HasPrefix(r.Path, prefix) {
			if r.Flags == "" { // Envoy leaves out what is empty
				r.Flags = "-"
			}
			out = append(out, r)
		}
	}
	return out
}

// ourSidecar is the sidecar of this repository.
type ourSidecar struct{ arguments []string }

func (ourSidecar) name() string { return "outrigger" }

func (o ourSidecar) start(t *testing.T, p place) proxy {
	t.Helper()
	c := p.config
	args := []string{
		"--namespace", c.Namespace, "--workload", c.Workload, "--instance", c.Instance, "--service-account", c.ServiceAccount,
		"--control-plane", c.ControlPlane, "--admin-address", p.admin, "--metrics-address", "", "--health-address", "",
	}
	for _, u := range c.Upstreams {
		args = append(args, "--upstream", u.String())
	}
	for _, in := range c.Inbounds {
		args = append(args, "--inbound", in.String())
	}
	return &runningSidecar{launch(t, c.Instance+"/sidecar", program("sidecar"), append(args, o.arguments...)...), p.admin}
}

type runningSidecar struct {
	p     *process
	admin string
}

func (s *runningSidecar) process() *process { return s.p }

func (s *runningSidecar) starting(t *testing.T) string {
	t.Helper()
	s.p.running(t)
	if status, text := get("http://" + s.admin + "/ready"); status != 200 {
		return "its sidecar is not ready: " + text
	}
	return ""
}

func (s *runningSidecar) ejected(t *testing.T, service string) int {
	t.Helper()
	var clusters []struct {
		Name      string
		Endpoints []struct{ Ejected bool }
	}
	getJSON(t, "http://"+s.admin+"/clusters", &clusters)
	n := 0
	for _, c := range clusters {
		if c.Name != key(service) {
			continue
		}
		for _, e := range c.Endpoints {
			if e.Ejected {
				n++
			}
		}
	}
	return n
}

func (s *runningSidecar) overflow(t *testing.T, service string) int {
	t.Helper()
	return metric(t, s.admin, "outrigger_breaker_rejected_total", `destination_service="`+service+`.shop.svc"`, `mode="Enforce"`)
}

func (s *runningSidecar) refused(t *testing.T) string {
	t.Helper()
	if strings.Contains(s.p.stderr.String(), "configuration rejected") {
		return s.p.stderr.tail(20)
	}
	return ""
}

// realEnvoy is Envoy as its project releases it.
type realEnvoy struct{ binary string }

func (realEnvoy) name() string { return "envoy" }

func (e realEnvoy) start(t *testing.T, p place) proxy {
	t.Helper()
	b, err := p.config.Envoy(p.admin)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(p.dir, p.config.Instance+".envoy.json")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return &runningEnvoy{launch(t, p.config.Instance+"/envoy", e.binary, "-c", file, "--disable-hot-restart",
		"--concurrency", "1", "--log-level", "warning", "--file-flush-interval-msec", "20"), p.admin}
}

type runningEnvoy struct {
	p     *process
	admin string
}

func (e *runningEnvoy) process() *process { return e.p }

func (e *runningEnvoy) starting(t *testing.T) string {
	t.Helper()
	e.p.running(t)
	if status, text := get("http://" + e.admin + "/ready"); status != 200 {
		return "its Envoy is not ready: " + text
	}
	for _, name := range []string{"cluster_manager.warming_clusters", "listener_manager.total_listeners_warming"} {
		if n := e.stat(t, name); n != 0 {
			return fmt.Sprintf("%s of its Envoy is %d", name, n)
		}
	}
	return ""
}

func (e *runningEnvoy) stat(t *testing.T, name string) int {
	t.Helper()
	status, text := get("http://" + e.admin + "/stats?filter=^" + regexp.QuoteMeta(name) + "$")
	if status != 200 {
		t.Fatalf("Envoy's stats: %d %s", status, text)
	}
	_, value, _ := strings.Cut(strings.TrimSpace(text), ": ")
	n, _ := strconv.Atoi(value) // what has never counted is not listed
	return n
}

// cluster is a stat of a service's cluster; Envoy writes _ for the colon.
func (e *runningEnvoy) cluster(t *testing.T, service, name string) int {
	t.Helper()
	return e.stat(t, "cluster."+strings.ReplaceAll(key(service), ":", "_")+"."+name)
}

func (e *runningEnvoy) ejected(t *testing.T, service string) int {
	t.Helper()
	return e.cluster(t, service, "outlier_detection.ejections_active")
}

func (e *runningEnvoy) overflow(t *testing.T, service string) int {
	t.Helper()
	// The first counts the limits on connections and pending requests, the second
	// that on requests.
	return e.cluster(t, service, "upstream_rq_pending_overflow") + e.cluster(t, service, "upstream_rq_active_overflow")
}

func (e *runningEnvoy) refused(t *testing.T) string {
	t.Helper()
	_, dump := get("http://" + e.admin + "/config_dump")
	if i := strings.Index(dump, "error_state"); i >= 0 {
		return dump[i:min(i+2000, len(dump))]
	}
	for _, name := range []string{"listener_manager.lds.update_rejected", "cluster_manager.cds.update_rejected"} {
		if n := e.stat(t, name); n != 0 {
			return fmt.Sprintf("%s is %d:\n%s", name, n, e.p.stderr.tail(20))
		}
	}
	return ""
}

// metric adds up the values of a Prometheus metric whose labels hold all of
// those given.
func metric(t *testing.T, admin, name string, labels ...string) int {
	t.Helper()
	status, text := get("http://" + admin + "/metrics")
	if status != 200 {
		t.Fatalf("metrics of %s: %d %s", admin, status, text)
	}
	sum := 0.0
lines:
	for s := bufio.NewScanner(strings.NewReader(text)); s.Scan(); {
		line := s.Text()
		series, value, ok := strings.Cut(line, "} ")
		if !ok {
			series, value, ok = strings.Cut(line, " ")
		}
		if !ok || (series != name && !strings.HasPrefix(series, name+"{")) {
			continue
		}
		for _, l := range labels {
			if !strings.Contains(series, l) {
				continue lines
			}
		}
		v, err := strconv.ParseFloat(value, 64)
		if err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		sum += v
	}
	return int(sum)
}

// listen is an ambassador port or an inbound port at address.
func listen(t *testing.T, address string) netip.AddrPort {
	t.Helper()
	a, err := netip.ParseAddrPort(address)
	if err != nil {
		t.Fatal(err)
	}
	return a
}
