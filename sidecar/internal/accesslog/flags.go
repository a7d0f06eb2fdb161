package accesslog

// Flags say how a request ended, in the letters of Envoy's %RESPONSE_FLAGS%.
type Flags uint32

// The flags that this sidecar sets.
const (
	DC  Flags = 1 << iota // downstream connection terminated
	DPE                   // downstream protocol error
	NC                    // no cluster: no such service
	NR                    // no route
	OM                    // overload: shed
	SI                    // stream idle timeout
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
	if f&(f-1) == 0 { // the usual case, without an allocation
		for i, l := range letters {
			if f == 1<<i {
				return l
			}
		}
	}
	s := ""
	for i, l := range letters {
		if f&(1<<i) != 0 {
			if s != "" {
				s += ","
			}
			s += l
		}
	}
	return s
}
