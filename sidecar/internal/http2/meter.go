package http2

import "time"

// meter rations something that a peer may do now and then: it has tokens,
// which come back with time and are earned by useful work. The ration bounds
// what an attack costs without knowing which use of a frame is honest.
type meter struct {
	tokens float64
	last   time.Time
}

// ration is how a meter fills.
type ration struct {
	burst  float64
	second float64 // tokens that come back in a second
}

var (
	// resets that a peer sends, or makes us send by breaking rules. Honest
	// clients cancel what they have begun, so finished streams earn tokens.
	resetRation = ration{burst: 400, second: 50}
	// settings: each is answered, and a new window touches every stream.
	settingsRation = ration{burst: 60, second: 2}
	// pings are answered. Peers that measure the bandwidth send one for each
	// round trip in which data came, so data sent earns tokens.
	pingRation = ration{burst: 400, second: 50}
	// windowRation is for WINDOW_UPDATE; data sent earns tokens.
	windowRation = ration{burst: 2000, second: 200}
	// emptyRation is for DATA without data; data received earns tokens.
	emptyRation = ration{burst: 200, second: 50}
	// uselessRation is for PRIORITY, unknown frames, and frames for streams that
	// are over.
	uselessRation = ration{burst: 1000, second: 100}
)

// take uses a token and reports whether there was one.
func (m *meter) take(now time.Time, r *ration) bool {
	switch {
	case m.last.IsZero():
		m.tokens = r.burst
	default:
		if d := now.Sub(m.last); d > 0 {
			m.tokens = min(r.burst, m.tokens+d.Seconds()*r.second)
		}
	}
	m.last = now
	if m.tokens < 1 {
		return false
	}
	m.tokens--
	return true
}

// earn gives n tokens for useful work.
func (m *meter) earn(n float64, r *ration) {
	if !m.last.IsZero() {
		m.tokens = min(r.burst, m.tokens+n)
	}
}

// meters of a connection.
type meters struct {
	resets, settings, pings, windows, empty, useless meter
}
