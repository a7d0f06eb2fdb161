package telemetry

import "math/rand/v2"

// TraceContext is a W3C trace context (Trace Context, section 3.2) as text, so
// that it can be written into headers and logs without conversion.
type TraceContext struct {
	TraceID  [32]byte // lower-case hex
	SpanID   [16]byte // of this proxy's span
	ParentID [16]byte // of the caller's span; zero where the trace begins here
	Sampled  bool
	Joined   bool // the caller sent a valid traceparent
}

// Begin joins the trace that a traceparent header names, or begins one. A
// header that is not exactly as the specification writes it is as good as none.
func (t *TraceContext) Begin(traceparent []byte, sample bool) {
	t.Joined = parseTraceparent(traceparent, t)
	if !t.Joined {
		draw((*[16]byte)(t.TraceID[:16]))
		draw((*[16]byte)(t.TraceID[16:]))
		t.ParentID = [16]byte{}
		t.Sampled = sample
	}
	draw(&t.SpanID)
}

// AppendTraceparent writes the header for the next hop.
func (t *TraceContext) AppendTraceparent(b []byte) []byte {
	b = append(b, "00-"...)
	b = append(b, t.TraceID[:]...)
	b = append(b, '-')
	b = append(b, t.SpanID[:]...)
	if t.Sampled {
		return append(b, "-01"...)
	}
	return append(b, "-00"...)
}

// draw writes 16 random digits that are not all zero: the specification forbids
// it.
func draw(digits *[16]byte) {
	v := rand.Uint64() | 1
	for i := range digits {
		digits[i] = "0123456789abcdef"[v&15]
		v >>= 4
	}
}

// parseTraceparent reads version-traceid-parentid-flags. Later versions may add
// fields after the flags; version ff is invalid.
func parseTraceparent(h []byte, t *TraceContext) bool {
	if len(h) < 55 || h[2] != '-' || h[35] != '-' || h[52] != '-' {
		return false
	}
	if !hexes(h[:2]) || !hexes(h[3:35]) || !hexes(h[36:52]) || !hexes(h[53:55]) || string(h[:2]) == "ff" {
		return false
	}
	if len(h) > 55 && (string(h[:2]) == "00" || h[55] != '-') {
		return false
	}
	if zeros(h[3:35]) || zeros(h[36:52]) {
		return false
	}
	copy(t.TraceID[:], h[3:35])
	copy(t.ParentID[:], h[36:52])
	t.Sampled = value[h[54]]&1 == 1 // sampled is the lowest bit
	return true
}

// value of a lower-case hex digit; -1 of every other byte.
var value = func() (v [256]int8) {
	for i := range v {
		v[i] = -1
	}
	for i, c := range []byte("0123456789abcdef") {
		v[c] = int8(i)
	}
	return v
}()

func hexes(b []byte) bool {
	bad := int8(0)
	for _, c := range b {
		bad |= value[c]
	}
	return bad >= 0
}

func zeros(b []byte) bool {
	for _, c := range b {
		if c != '0' {
			return false
		}
	}
	return true
}
