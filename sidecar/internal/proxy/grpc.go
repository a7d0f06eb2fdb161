package proxy

import (
	"strconv"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/retry"
)

// isGRPC reports whether a content type is that of gRPC (gRPC over HTTP/2,
// "Requests"): application/grpc, alone or with a suffix.
func isGRPC(contentType []byte) bool {
	const name = "application/grpc"
	if len(contentType) < len(name) || !http1.EqualFold(contentType[:len(name)], name) {
		return false
	}
	rest := contentType[len(name):]
	return len(rest) == 0 || rest[0] == '+' || rest[0] == ';'
}

// Codes of gRPC that we answer with (gRPC status codes).
const (
	grpcUnknown          = 2
	grpcDeadlineExceeded = 4
	grpcPermissionDenied = 7
	grpcResourceExhaust  = 8
	grpcUnimplemented    = 12
	grpcInternal         = 13
	grpcUnavailable      = 14
	grpcUnauthenticated  = 16
)

// grpcOf is the code for an answer that carries an HTTP status alone (gRPC,
// "HTTP to gRPC Status Code Mapping"); 504 is our own timeout.
func grpcOf(status int) int {
	switch status {
	case 400:
		return grpcInternal
	case 401:
		return grpcUnauthenticated
	case 403:
		return grpcPermissionDenied
	case 404:
		return grpcUnimplemented
	case 408, 504:
		return grpcDeadlineExceeded
	case 429, 502, 503:
		return grpcUnavailable
	case 431:
		return grpcResourceExhaust
	default:
		return grpcUnknown
	}
}

// httpOf is the HTTP status that stands for a gRPC code where only HTTP is
// understood, as in Envoy's outlier detection: a call that failed was answered
// 200.
func httpOf(code int) int {
	switch code {
	case 0:
		return 200
	case 1:
		return 499
	case 3, 9, 11:
		return 400
	case 4:
		return 504
	case 5:
		return 404
	case 6, 10:
		return 409
	case 7:
		return 403
	case 8:
		return 429
	case 12:
		return 501
	case 14:
		return 503
	case 16:
		return 401
	default:
		return 500
	}
}

// replyGRPC makes a reply one that a gRPC client understands: Trailers-Only, with
// the status that our HTTP status stands for and the reason as its message.
func (x *exchange) replyGRPC(h *http1.Head, e *http1.Edit) {
	x.grpcStatus = grpcOf(h.Status)
	h.Status, x.status = 200, 200
	e.Framing = http1.None
	e.Set = append(e.Set,
		http1.Pair{Name: "content-type", Value: []byte("application/grpc")},
		http1.Pair{Name: "grpc-status", Value: strconv.AppendInt(nil, int64(x.grpcStatus), 10)},
		http1.Pair{Name: "grpc-message", Value: appendGRPCMessage(nil, "outrigger: "+x.detail)})
}

// appendGRPCMessage writes a Status-Message: what is not printable ASCII is
// escaped, and so is '%'.
func appendGRPCMessage(b []byte, s string) []byte {
	const hex = "0123456789ABCDEF"
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '%' {
			b = append(b, '%', hex[c>>4], hex[c&15])
		} else {
			b = append(b, c)
		}
	}
	return b
}

// parseGRPCStatus is the value of a grpc-status header or trailer;
// retry.NoGRPC where it is none.
func parseGRPCStatus(v []byte) int {
	n, err := strconv.Atoi(string(v))
	if err != nil || n < 0 || n > 99 || len(v) > 2 {
		return retry.NoGRPC
	}
	return n
}

// grpcStatusIn finds grpc-status among trailers.
func grpcStatusIn(trailers []http1.Header) int {
	for i := range trailers {
		if http1.EqualFold(trailers[i].Name, "grpc-status") {
			return parseGRPCStatus(trailers[i].Value)
		}
	}
	return retry.NoGRPC
}
