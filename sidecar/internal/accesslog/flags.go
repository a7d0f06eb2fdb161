package accesslog

import "math/bits"

// Flags say how a request ended, in the letters of Envoy's %RESPONSE_FLAGS%.
type Flags uint32

// The flags that this sidecar sets.
const (
	DC  Flags = 1 << iota // downstream connection terminated
	DPE                   // downstream protocol error
	NC                    // no cluster: no such service
	NR                    // no route
	OM                    // overload: shed
	SI                    // no byte of a stream for too long
	UC                    // upstream connection terminated
	UF                    // upstream connection failure
	UH                    // no healthy upstream
	UO                    // upstream overflow: breaker or limit
	UPE                   // upstream protocol error
	URX                   // retry limit or budget exhausted
	UT                    // upstream request timeout
)

var letters = [...]string{"DC", "DPE", "NC", "NR", "OM", "SI", "UC", "UF", "UH", "UO", "UPE", "URX", "UT"}

// String joins the letters with commas, as Envoy does; "-" where there are none.
func (f Flags) String() string {
	if f == 0 {
		return "-"
	}
	if f&(f-1) == 0 && int(f) < 1<<len(letters) { // the usual case, without an allocation
		return letters[bits.TrailingZeros32(uint32(f))]
	}
	return string(f.appendTo(nil))
}

func (f Flags) appendTo(b []byte) []byte {
	if f == 0 {
		return append(b, '-')
	}
	first := true
	for i, l := range letters {
		if f&(1<<i) == 0 {
			continue
		}
		if !first {
			b = append(b, ',')
		}
		first = false
		b = append(b, l...)
	}
	return b
}
