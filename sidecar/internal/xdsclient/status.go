package xdsclient

import (
	"maps"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Status is what the admin interface shows of a Client.
type Status struct {
	Address   string    `json:"address"`
	Connected bool      `json:"connected"`
	Since     time.Time `json:"since,omitzero"` // of the connection made last
	// FromFile: the last good configuration was loaded at start.
	FromFile     bool      `json:"from_file,omitempty"`
	LastError    string    `json:"last_error,omitempty"`
	LastErrorAt  time.Time `json:"last_error_at,omitzero"`
	Reconnects   int       `json:"reconnects"`
	TableVersion string    `json:"table_version"`
	Wanted       []string  `json:"wanted"`
	// Types in the order listener, route, cluster, endpoints.
	Types     [4]TypeStatus    `json:"types"`
	Resources []ResourceStatus `json:"resources"`
}

// TypeStatus counts the responses of one type.
type TypeStatus struct {
	Type     string    `json:"type"`
	Nonce    string    `json:"nonce,omitempty"` // of the last response
	At       time.Time `json:"at,omitzero"`
	Acks     int       `json:"acks"`
	Nacks    int       `json:"nacks"`
	LastNack string    `json:"last_nack,omitempty"`
}

// ResourceStatus is one resource that is subscribed to.
type ResourceStatus struct {
	Type string `json:"type"`
	Name string `json:"name"`
	// State is requested, accepted or missing: what is in force.
	State   string `json:"state"`
	Version string `json:"version,omitempty"`
	// Rejected says why the version that arrived last is not in force.
	Rejected string `json:"rejected,omitempty"`
}

// Status of the client now.
func (c *Client) Status() Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	st := c.status
	st.Wanted = slices.Sorted(maps.Keys(c.store.wanted))
	for k := range kinds {
		st.Types[k].Type = k.String()
		for _, name := range slices.Sorted(maps.Keys(c.store.res[k])) {
			r := c.store.res[k][name]
			state := "requested"
			switch {
			case r.missing:
				state = "missing"
			case r.answered:
				state = "accepted"
			}
			st.Resources = append(st.Resources, ResourceStatus{k.String(), name, state, r.version, r.rejected})
		}
	}
	return st
}

type metrics struct {
	connected    prometheus.Gauge
	updates      *prometheus.CounterVec
	reconnects   prometheus.Counter
	lastUpdate   prometheus.Gauge
	destinations prometheus.Gauge
	refused      prometheus.Counter
	saves        *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		connected:    prometheus.NewGauge(prometheus.GaugeOpts{Name: "outrigger_xds_connected", Help: "1 while the stream to the control plane is open."}),
		updates:      prometheus.NewCounterVec(prometheus.CounterOpts{Name: "outrigger_xds_updates_total", Help: "Resources received, by type; result is accepted, rejected or removed."}, []string{"type", "result"}),
		reconnects:   prometheus.NewCounter(prometheus.CounterOpts{Name: "outrigger_xds_reconnects_total", Help: "Streams to the control plane that failed or could not be opened."}),
		lastUpdate:   prometheus.NewGauge(prometheus.GaugeOpts{Name: "outrigger_xds_last_update_timestamp_seconds", Help: "When the control plane sent something last; 0 for never."}),
		destinations: prometheus.NewGauge(prometheus.GaugeOpts{Name: "outrigger_xds_destinations", Help: "Destinations in the routing table."}),
		refused:      prometheus.NewCounter(prometheus.CounterOpts{Name: "outrigger_xds_destinations_refused_total", Help: "Destinations not asked for: their key is not valid, or too many are wanted."}),
		saves:        prometheus.NewCounterVec(prometheus.CounterOpts{Name: "outrigger_xds_saves_total", Help: "Writes of the last good configuration; result is written or failed."}, []string{"result"}),
	}
	if reg != nil {
		reg.MustRegister(m.connected, m.updates, m.reconnects, m.lastUpdate, m.destinations, m.refused, m.saves)
	}
	return m
}
