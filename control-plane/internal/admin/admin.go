// Package admin is the control plane's window for people and for Prometheus:
// readiness, metrics, and what is in force.
//
// It knows HTTP and how to render; it is handed functions that return what to
// show. It serves loopback only, because what it shows is the configuration of
// the whole mesh. Its caller is main.
package admin

import (
	"encoding/json"
	"log/slog"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
	"github.com/outrigger-mesh/outrigger/program"
)

// Options are what is shown. The functions are called once a request, from any
// goroutine. What they return is rendered as JSON.
type Options struct {
	Log      *slog.Logger
	Gatherer prometheus.Gatherer
	// Ready says why the control plane cannot serve yet; nil when it can.
	Ready func() error
	// Mesh in force; nil before the first build.
	Mesh func() *mesh.Mesh
	// Problems of the objects.
	Problems func() any
	// Proxies: who is connected and has applied what.
	Proxies func() any
	// XDS: all that is served.
	XDS func() (any, error)
}

// Handler serves /ready, /healthz, /metrics and /debug/{mesh,problems,proxies,xds}.
func Handler(o Options) http.Handler {
	mux := http.NewServeMux()
	program.Operate(mux, o.Ready, o.Gatherer, o.Log)
	mux.HandleFunc("GET /debug/mesh", func(w http.ResponseWriter, _ *http.Request) {
		program.Answer(w, o.Log, http.StatusOK, Describe(o.Mesh()))
	})
	show := func(get func() any) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { object(o.Log, w, get()) }
	}
	mux.HandleFunc("GET /debug/problems", show(o.Problems))
	mux.HandleFunc("GET /debug/proxies", show(o.Proxies))
	mux.HandleFunc("GET /debug/xds", func(w http.ResponseWriter, _ *http.Request) {
		v, err := o.XDS()
		if err != nil {
			program.Answer(w, o.Log, http.StatusInternalServerError, err.Error()+"\n")
			return
		}
		object(o.Log, w, v)
	})
	return mux
}

func object(log *slog.Logger, w http.ResponseWriter, v any) {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		program.Answer(w, log, http.StatusInternalServerError, err.Error()+"\n")
		return
	}
	w.Header().Set("Content-Type", "application/json")
	program.Answer(w, log, http.StatusOK, string(b)+"\n")
}
