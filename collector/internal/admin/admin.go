// Package admin is the collector's window for people and for Prometheus:
// readiness, metrics, the audit of the logs, and the embedded store's search.
//
// It knows HTTP; what it shows comes from functions and handlers that main hands
// it. It is to be served on loopback only, because the store shows every log of the node.
package admin

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/outrigger-mesh/outrigger/program"
)

// writeTimeout bounds what is not streamed.
const writeTimeout = 30 * time.Second

// Options are what is shown. Functions are called once a request, from any
// goroutine.
type Options struct {
	Log      *slog.Logger
	Gatherer prometheus.Gatherer
	// Ready says why the collector does not work; nil when it does.
	Ready func() error
	// Audit, Why and Cost are rendered as JSON.
	Audit, Why, Cost func() any
	// Replay sends the dead letters of an output again and returns their bytes.
	Replay func(output string) (bytes int64, err error)
	// Store serves all else under /api/v1/; nil where there is no store. It
	// bounds its own answers in time, since some are streams.
	Store http.Handler
}

// Handler serves /healthz, /ready, /metrics, /api/v1/audit, /api/v1/why, /api/v1/cost and the store.
func Handler(o Options) http.Handler {
	own := http.NewServeMux()
	program.Operate(own, o.Ready, o.Gatherer, o.Log)
	bounded := http.TimeoutHandler(own, writeTimeout, "timed out\n")
	mux := http.NewServeMux()
	mux.Handle("/", bounded)
	for path, show := range map[string]func() any{"GET /api/v1/audit": o.Audit, "GET /api/v1/why": o.Why, "GET /api/v1/cost": o.Cost} {
		mux.Handle(path, bounded)
		own.HandleFunc(path, func(w http.ResponseWriter, _ *http.Request) {
			b, err := json.MarshalIndent(show(), "", "  ")
			if err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
				return
			}
			w.Header().Set("Content-Type", "application/json")
			program.Answer(w, o.Log, http.StatusOK, string(b)+"\n")
		})
	}
	mux.Handle("POST /api/v1/replay", bounded)
	own.HandleFunc("POST /api/v1/replay", func(w http.ResponseWriter, r *http.Request) {
		// A page in a browser on this machine could send a form here, but not this type.
		if r.Header.Get("Content-Type") != "application/json" {
			http.Error(w, "send Content-Type: application/json", http.StatusUnsupportedMediaType)
			return
		}
		n, err := o.Replay(r.URL.Query().Get("output"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		program.Answer(w, o.Log, http.StatusOK, fmt.Sprintf("{\"bytes\": %d}\n", n))
	})
	if o.Store != nil {
		mux.Handle("/api/v1/", o.Store)
	} else {
		mux.HandleFunc("/api/v1/", func(w http.ResponseWriter, r *http.Request) {
			http.Error(w, fmt.Sprintf("%s needs an output of kind store, and the configuration has none", r.URL.Path), http.StatusNotFound)
		})
	}
	return mux
}
