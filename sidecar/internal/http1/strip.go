package http1

// Strip has the headers that drop names left out of what is written, as if the
// sender had named them in Connection. Fields that frame or route the message
// are not asked about.
func (h *Head) Strip(drop func(name []byte) bool) {
	for i := range h.Headers {
		f := &h.Headers[i]
		if (f.kind == plain || f.kind == unclassified) && drop(f.Name) {
			f.kind, f.hop = plain, true
		}
	}
}
