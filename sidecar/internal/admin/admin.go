// Package admin is what an operator may ask a running sidecar: readiness,
// metrics, what it was told, why a breaker opened, and to drain.
//
// It renders what other packages know and holds no state of its own. Everything
// but readiness and metrics belongs on a loopback address.
package admin

import (
	"encoding/json"
	"log/slog"
	"net/http"
	"sort"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/outrigger-mesh/outrigger/program"
	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/breaker"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/proxy"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/upstream"
)

// Server answers operators. Its fields are set once.
type Server struct {
	Table    *table.Current
	Clusters *upstream.Clusters
	Metrics  prometheus.Gatherer
	Log      *slog.Logger
	// Ready says why the proxy is not ready; nil when it is.
	Ready func() error
	// Control is the state of the stream to the control plane, as JSON.
	Control func() any
	// Detected is what was found out about ports of undeclared protocol, as JSON.
	Detected func() any
	// Probes of the application; nil where none are led here.
	Probes *Probes
	// Captured is what is called by address, as JSON; nil where nothing is captured.
	Captured func() any
	// Drain begins to drain; Quit ends the program.
	Drain, Quit func()
}

// Health serves /healthz, /ready and /metrics, for probes, and those of the
// application.
func (s *Server) Health() http.Handler {
	mux := http.NewServeMux()
	program.Operate(mux, s.Ready, s.Metrics, s.Log)
	if s.Probes != nil {
		mux.Handle("GET "+bootstrap.ProbePath, s.Probes)
	}
	return mux
}

// Scrape serves /metrics and nothing else.
func (s *Server) Scrape() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", program.Metrics(s.Metrics, s.Log))
	return mux
}

// Admin serves everything; for loopback only.
func (s *Server) Admin() http.Handler {
	mux := http.NewServeMux()
	program.Operate(mux, s.Ready, s.Metrics, s.Log)
	mux.HandleFunc("GET /config_dump", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, map[string]any{"control_plane": s.Control(), "table": dump(s.Table.Load())})
	})
	mux.HandleFunc("GET /clusters", func(w http.ResponseWriter, _ *http.Request) { answer(w, s.clusters()) })
	mux.HandleFunc("GET /debug/breakers", func(w http.ResponseWriter, _ *http.Request) { answer(w, s.breakers()) })
	mux.HandleFunc("GET /debug/breakers/{id}", s.evidence)
	mux.HandleFunc("GET /debug/detected", func(w http.ResponseWriter, _ *http.Request) { answer(w, s.Detected()) })
	if s.Captured != nil {
		mux.HandleFunc("GET /debug/captured", func(w http.ResponseWriter, _ *http.Request) { answer(w, s.Captured()) })
	}
	mux.HandleFunc("GET /debug/path", func(w http.ResponseWriter, _ *http.Request) { answer(w, proxy.Layers()) })
	mux.HandleFunc("POST /drain", func(w http.ResponseWriter, _ *http.Request) {
		s.Drain()
		answer(w, map[string]string{"status": "draining"})
	})
	mux.HandleFunc("POST /quitquitquit", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, map[string]string{"status": "quitting"})
		s.Quit()
	})
	return mux
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	_ = e.Encode(v) // a client that hangs up is no concern of ours
}

// Breaker is a destination's breaker as /debug/breakers shows it.
type Breaker struct {
	Destination string             `json:"destination"`
	Policy      string             `json:"policy"`
	Mode        string             `json:"mode"`
	State       string             `json:"state"`
	ProbesIn    string             `json:"probes_in,omitempty"`
	Evidence    []breaker.Evidence `json:"evidence"`
}

func (s *Server) breakers() []Breaker {
	now := time.Now()
	out := []Breaker{}
	for _, c := range s.sorted() {
		b := c.Breaker()
		if b == nil {
			continue
		}
		state, left := b.State(now)
		v := Breaker{Destination: c.Name, Policy: b.Policy().Name, Mode: "Enforce", State: state.String(), Evidence: b.Evidence()}
		if b.Policy().Observe {
			v.Mode = "Observe"
		}
		if left > 0 {
			v.ProbesIn = left.Round(time.Millisecond).String()
		}
		out = append(out, v)
	}
	return out
}

func (s *Server) evidence(w http.ResponseWriter, r *http.Request) {
	id := r.PathValue("id")
	for _, c := range s.sorted() {
		b := c.Breaker()
		if b == nil {
			continue
		}
		for _, e := range b.Evidence() {
			if e.ID == id {
				answer(w, e)
				return
			}
		}
	}
	http.Error(w, "no evidence "+id+" here: a breaker keeps its last 16 changes; older ones are in the logs", http.StatusNotFound)
}

func (s *Server) sorted() []*upstream.Cluster {
	all := s.Clusters.All()
	sort.Slice(all, func(i, j int) bool { return all[i].Name < all[j].Name })
	return all
}

type clusterView struct {
	Name      string         `json:"name"`
	Policy    string         `json:"policy,omitempty"`
	Usage     upstream.Usage `json:"usage"`
	Limits    table.Limits   `json:"limits"`
	Endpoints []endpointView `json:"endpoints"`
}

type endpointView struct {
	Address  string `json:"address"`
	Instance string `json:"instance"`
	Healthy  bool   `json:"healthy"`
	Ejected  bool   `json:"ejected"`
	Active   int64  `json:"active"`
}

func (s *Server) clusters() []clusterView {
	out := []clusterView{}
	for _, c := range s.sorted() {
		v := clusterView{Name: c.Name, Policy: c.Config().Policy, Usage: c.Usage(), Limits: c.Config().Limits}
		for _, e := range c.Endpoints() {
			v.Endpoints = append(v.Endpoints, endpointView{e.Name, e.Instance, e.Healthy, e.Ejected(), e.Active()})
		}
		out = append(out, v)
	}
	return out
}

// dump shows a Table with what is compiled in it as text.
func dump(t *table.Table) any {
	type routeView struct {
		Name     string   `json:"name"`
		Match    string   `json:"match"`
		Clusters []string `json:"clusters"`
		Timeout  string   `json:"timeout"`
		Retry    string   `json:"retry"`
		Attempts int      `json:"attempts"`
	}
	type destinationView struct {
		Service  string      `json:"service,omitempty"`
		Missing  bool        `json:"missing,omitempty"`
		Protocol string      `json:"protocol"`
		Cluster  string      `json:"cluster,omitempty"`
		Names    []string    `json:"server_names,omitempty"`
		Routes   []routeView `json:"routes,omitempty"`
	}
	destinations := map[string]destinationView{}
	for key, d := range t.Destinations {
		v := destinationView{Service: d.Service, Missing: d.Missing, Protocol: d.Protocol, Cluster: d.Cluster}
		for _, n := range d.ServerNames {
			v.Names = append(v.Names, n.Name)
		}
		if d.Routes != nil {
			for _, r := range d.Routes.Routes {
				rv := routeView{Name: r.Name, Match: matchText(&r.Match), Timeout: r.Timeout.String(), Retry: r.Retry.On.String(), Attempts: r.Retry.Attempts}
				for _, c := range r.Clusters {
					rv.Clusters = append(rv.Clusters, c.Cluster)
				}
				v.Routes = append(v.Routes, rv)
			}
		}
		destinations[key] = v
	}
	out := map[string]any{"version": t.Version, "destinations": destinations, "clusters": t.Clusters}
	if in := t.Inbound; in != nil {
		ports := map[string]string{"others": in.Default.Protocol}
		for n, p := range in.Ports {
			ports[strconv.Itoa(int(n))] = p.Protocol
		}
		out["inbound"] = map[string]any{"mtls": in.MTLS, "ports": ports}
	}
	return out
}
