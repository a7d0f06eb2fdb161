// Package http2 is HTTP/2 (RFC 9113) for a proxy, as the server of one side
// and the client of the other.
//
// It knows frames, header compression, stream states, settings, flow control,
// GOAWAY, how writes of many streams become few system calls, and how a peer
// may abuse each of them. A message is an http1.Head, edited by an http1.Edit,
// on both sides, so that package proxy need not know which version it came in.
// It does not know routes, policies, who listens or dials, or when to retry:
// package proxy accepts and dials connections and calls NewServer and
// NewClient.
//
// Field sections are decompressed by golang.org/x/net/http2/hpack. Frames are
// parsed here, where they lie in the read buffer, because the framer of
// x/net/http2 copies every payload into a buffer that it keeps for the life of
// the connection and allocates for each frame.
//
// A connection is one mutex, one goroutine that reads, and one goroutine per
// stream that the server serves. Nobody owns writing: whoever has something to
// send and finds nobody writing sends what all have queued. The goroutine that
// reads never waits for a write, so two peers cannot wait for each other.
//
// Everything a peer can make this package keep has a limit: bytes not read (the
// windows), streams (MaxStreams), header bytes and fields, bytes not sent (64
// KiB and one frame for each stream that is writing), and control frames to
// answer. What costs work and brings none (resets, pings, settings, empty
// frames) is rationed; see meter.go.
package http2

import (
	"errors"
	"time"
)

// Config bounds a connection. Zero fields take the defaults. It must not change
// while connections use it.
type Config struct {
	// MaxStreams bounds the streams that the peer may have open, and the
	// handlers that run for them, at once. Default 250.
	MaxStreams int
	// StreamWindow bounds the bytes of a body that are received and not yet
	// read. Default 256 KiB.
	StreamWindow int32
	// ConnWindow is StreamWindow for all streams of the connection together; at
	// least 65535, which the protocol begins with. Default 1 MiB.
	ConnWindow int32
	// MaxHeaderBytes bounds a field section, decompressed, each field counted
	// with 32 bytes more (RFC 9113 section 6.5.2). A larger one is answered 431
	// by a server and fails the stream of a client. Default 64 KiB.
	MaxHeaderBytes int
	// MaxHeaders bounds the fields of a section. Default 128.
	MaxHeaders int
	// Scheme of the requests that a client writes, "http" or "https". Default
	// "http".
	Scheme string
	// IdleTimeout after which a connection without streams is ended with
	// GOAWAY. Default 5 minutes; negative means never.
	IdleTimeout time.Duration
	// HeadTimeout bounds the time from the first byte of a field section to its
	// end, and from the beginning of the connection to the peer's first
	// SETTINGS. Default 15 seconds.
	HeadTimeout time.Duration
	// WriteTimeout bounds one write of up to about 100 KiB: a peer that takes
	// longer to read it loses the connection. Default 30 seconds.
	WriteTimeout time.Duration
	// PingEvery is how long a connection with open streams may be silent before
	// it is asked for a sign of life, and how long it then has to give one.
	// Default 30 seconds; negative means never.
	PingEvery time.Duration
	// OnProtocolError is told why a connection or a stream was ended for
	// something its peer did, as one of the Reason constants. It is called
	// without locks held, from any goroutine; it must not block.
	OnProtocolError func(reason string)
}

const (
	defaultMaxStreams     = 250
	defaultStreamWindow   = 256 << 10
	defaultConnWindow     = 1 << 20
	defaultMaxHeaderBytes = 64 << 10
	defaultMaxHeaders     = 128
	defaultIdleTimeout    = 5 * time.Minute
	defaultHeadTimeout    = 15 * time.Second
	defaultWriteTimeout   = 30 * time.Second
	defaultPingEvery      = 30 * time.Second
)

func orDefault[T int | int32 | time.Duration](v, def T) T {
	if v == 0 {
		return def
	}
	return v
}

// resolved is cfg with every default filled in.
func (cfg *Config) resolved() Config {
	var r Config
	if cfg != nil {
		r = *cfg
	}
	r.MaxStreams = orDefault(r.MaxStreams, defaultMaxStreams)
	r.StreamWindow = orDefault(r.StreamWindow, defaultStreamWindow)
	r.ConnWindow = max(orDefault(r.ConnWindow, defaultConnWindow), initialWindow)
	r.MaxHeaderBytes = orDefault(r.MaxHeaderBytes, defaultMaxHeaderBytes)
	r.MaxHeaders = orDefault(r.MaxHeaders, defaultMaxHeaders)
	r.IdleTimeout = orDefault(r.IdleTimeout, defaultIdleTimeout)
	r.HeadTimeout = orDefault(r.HeadTimeout, defaultHeadTimeout)
	r.WriteTimeout = orDefault(r.WriteTimeout, defaultWriteTimeout)
	r.PingEvery = orDefault(r.PingEvery, defaultPingEvery)
	if r.Scheme == "" {
		r.Scheme = "http"
	}
	return r
}

// Errors that say what to do next.
var (
	// ErrBusy says that the peer allows no further stream now: take another
	// connection, or this one later.
	ErrBusy = errors.New("http2: the peer's limit of concurrent streams is reached")
	// ErrGone says that the connection takes no further streams: it is closed or
	// closing, or its stream identifiers are used up.
	ErrGone = errors.New("http2: the connection takes no new streams")
	// ErrInterrupted says that Interrupt ended a wait.
	ErrInterrupted = errors.New("http2: the wait was interrupted")
	// ErrClosed says that Close ended the connection.
	ErrClosed = errors.New("http2: the connection was closed")
)

var (
	errIdle    = errors.New("http2: the connection was idle for too long")
	errDrained = errors.New("http2: the connection was drained")
	errPing    = errors.New("http2: the peer does not answer to PING")
	errWrite   = errors.New("http2: the peer does not read")
	errDone    = errors.New("http2: the stream has been written to its end")
	errOrder   = errors.New("http2: a body or trailers before a final head, or a second head")
)

// StreamError ends one stream.
type StreamError struct {
	// Code of the RST_STREAM.
	Code ErrCode
	// Remote: the peer sent it; else it was sent to the peer.
	Remote bool
	// Reason is one of the Reason constants if the peer broke a rule, or empty.
	Reason string
}

// Error names who ended the stream and why.
func (e *StreamError) Error() string { return describe("stream", e.Code, e.Remote, e.Reason) }

// ConnError ends a connection and with it all its streams.
type ConnError struct {
	// Code of the GOAWAY.
	Code ErrCode
	// Remote: the peer sent it; else it was sent to the peer.
	Remote bool
	// Reason is one of the Reason constants if the peer broke a rule, or empty.
	Reason string
}

// Error names who ended the connection and why.
func (e *ConnError) Error() string { return describe("connection", e.Code, e.Remote, e.Reason) }

func describe(what string, code ErrCode, remote bool, reason string) string {
	s := "http2: " + what + " reset: " + code.String()
	if remote {
		s = "http2: " + what + " reset by the peer: " + code.String()
	}
	if reason != "" {
		s += " (" + reason + ")"
	}
	return s
}

// Reasons for which a stream or a connection is ended: stable tokens for logs
// and for the label of a metric.
const (
	ReasonRapidReset        = "rapid_reset"        // CVE-2023-44487, CVE-2025-8671
	ReasonContinuation      = "continuation_flood" // CVE-2024-27316
	ReasonHeaderList        = "header_list_too_large"
	ReasonSettingsFlood     = "settings_flood" // CVE-2019-9515
	ReasonPingFlood         = "ping_flood"     // CVE-2019-9512
	ReasonWindowUpdateFlood = "window_update_flood"
	ReasonEmptyData         = "empty_data_flood"    // CVE-2019-9518
	ReasonUselessFrames     = "useless_frame_flood" // PRIORITY and unknown frames
	ReasonInterimFlood      = "interim_flood"
	ReasonQueue             = "control_queue" // replies that the peer does not read
	ReasonHeadTimeout       = "head_timeout"
	ReasonWriteTimeout      = "write_timeout"
	ReasonPreface           = "bad_preface"       // RFC 9113 section 3.4
	ReasonFrameSize         = "bad_frame_size"    // RFC 9113 section 4.2
	ReasonFrame             = "bad_frame"         // a frame where its type may not stand
	ReasonSetting           = "bad_setting"       // RFC 9113 section 6.5.2
	ReasonFlowControl       = "flow_control"      // RFC 9113 section 5.2
	ReasonStreamID          = "bad_stream_id"     // RFC 9113 section 5.1.1
	ReasonStreamClosed      = "stream_closed"     // RFC 9113 section 5.1
	ReasonPush              = "push"              // RFC 9113 section 8.4
	ReasonTooManyStreams    = "too_many_streams"  // RFC 9113 section 5.1.2
	ReasonCompression       = "bad_compression"   // RFC 9113 section 4.3
	ReasonPseudoHeader      = "bad_pseudo_header" // RFC 9113 section 8.3
	ReasonName              = "bad_name"          // RFC 9113 section 8.2.1
	ReasonValue             = "bad_value"         // RFC 9113 section 8.2.1
	ReasonConnectionField   = "connection_field"  // RFC 9113 section 8.2.2
	ReasonHost              = "bad_host"          // RFC 9113 section 8.3.1
	ReasonPath              = "bad_path"          // RFC 9113 section 8.3.1
	ReasonLength            = "bad_length"        // RFC 9113 section 8.1.1
	ReasonTrailers          = "bad_trailers"      // RFC 9113 section 8.1
	ReasonResponse          = "bad_response"      // RFC 9113 section 8.1
)
