package torture

import (
	"context"
	"errors"
	"net"
	"net/http"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

// otlp is the kit's own receiver of OTLP logs over HTTP, protobuf alone.
type otlp struct {
	*gate
	judge *judge
}

func newOTLP(j *judge) (*otlp, error) {
	o := &otlp{judge: j}
	var err error
	o.gate, err = newGate(func(l net.Listener) {
		server := &http.Server{Handler: o, ReadHeaderTimeout: time.Minute, ErrorLog: quiet()}
		_ = server.Serve(l) // it says that the listener was closed
		_ = server.Close()  // breaks what is under way
	})
	return o, err
}

func (o *otlp) settings() string              { return `otlp: {endpoint: "http://` + o.addr + `", timeout: 3s}` }
func (o *otlp) address() string               { return "http://" + o.addr }
func (o *otlp) close()                        { o.down() }
func (o *otlp) collect(context.Context) error { return nil }

func (o *otlp) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := readBody(r, maxRequest)
	if err != nil {
		w.WriteHeader(http.StatusRequestEntityTooLarge)
		return
	}
	f, err := o.wait(r.Context())
	if err != nil {
		panic(http.ErrAbortHandler) // closes the connection
	}
	var texts [][]byte
	if err := logBodies(body, func(text []byte) { texts = append(texts, text) }); err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/x-protobuf")
	switch f.mode {
	case busy, busyItem: // OTLP refuses requests, not records
		w.Header().Set("Retry-After", "1")
		w.WriteHeader(http.StatusTooManyRequests)
		return
	case tooLarge:
		if len(body) > f.limit {
			w.WriteHeader(http.StatusRequestEntityTooLarge)
			return
		}
	case reject: // partial success: the last record of ten is refused
		keep := len(texts) - len(texts)/10
		rejected := len(texts) - keep
		for _, t := range texts[:keep] {
			o.judge.arrive(t, time.Now())
		}
		var partial, answer []byte
		partial = protowire.AppendTag(partial, 1, protowire.VarintType)
		partial = protowire.AppendVarint(partial, uint64(rejected))
		answer = protowire.AppendTag(answer, 1, protowire.BytesType)
		answer = protowire.AppendBytes(answer, partial)
		_, _ = w.Write(answer) // the collector may be gone
		return
	default:
	}
	for _, t := range texts {
		o.judge.arrive(t, time.Now())
	}
	if f.mode == swallow {
		panic(http.ErrAbortHandler)
	}
}

var errProtobuf = errors.New("this is no ExportLogsServiceRequest")

// logBodies calls f with the body of each record of an ExportLogsServiceRequest,
// where it is a string (opentelemetry/proto/collector/logs/v1).
func logBodies(b []byte, f func(text []byte)) error {
	return fields(b, 1, func(resourceLogs []byte) error {
		return fields(resourceLogs, 2, func(scopeLogs []byte) error {
			return fields(scopeLogs, 2, func(record []byte) error {
				return fields(record, 5, func(body []byte) error {
					return fields(body, 1, func(text []byte) error { f(text); return nil })
				})
			})
		})
	})
}

// fields calls f with each field of the message that has the number and is of
// bytes.
func fields(b []byte, number protowire.Number, f func([]byte) error) error {
	for len(b) > 0 {
		n, t, size := protowire.ConsumeTag(b)
		if size < 0 {
			return errProtobuf
		}
		b = b[size:]
		if n == number && t == protowire.BytesType {
			v, size := protowire.ConsumeBytes(b)
			if size < 0 {
				return errProtobuf
			}
			if err := f(v); err != nil {
				return err
			}
			b = b[size:]
			continue
		}
		if size = protowire.ConsumeFieldValue(n, t, b); size < 0 {
			return errProtobuf
		}
		b = b[size:]
	}
	return nil
}
