package main

import "github.com/outrigger-mesh/outrigger/deploy/bench/load"

// scenario is one kind of traffic.
type scenario struct {
	name     string // key in the results
	title    string
	unit     string // what a request is
	protocol string // of package load, and the upstream's port
	conns    int    // of the closed and the open loops
	streams  int    // on each of them
	rates    []int  // of the open loops, requests a second
	idle     bool   // measure memory at many idle connections too
	pair     bool   // two proxies, mutual TLS between them
}

func (s scenario) http() bool { return s.protocol != load.TCPEcho }
func (s scenario) grpc() bool { return s.protocol == load.GRPCUnary || s.protocol == load.GRPCStream }

// lineEach reports whether an access log has a line a request, and not one a
// connection or a stream.
func (s scenario) lineEach() bool { return s.http() && s.protocol != load.GRPCStream }

var scenarios = []scenario{
	{name: "h1_1k", title: "HTTP/1.1, 1 KiB", unit: "request", protocol: load.HTTP1Small, conns: 64, streams: 1, rates: []int{1000, 5000}, idle: true},
	{name: "h1_64k", title: "HTTP/1.1, 64 KiB", unit: "request", protocol: load.HTTP1Large, conns: 64, streams: 1, rates: []int{1000}},
	{name: "grpc_unary", title: "gRPC, unary", unit: "call", protocol: load.GRPCUnary, conns: 8, streams: 8, rates: []int{1000, 5000}, idle: true},
	{name: "grpc_stream", title: "gRPC, streaming", unit: "message there and back", protocol: load.GRPCStream, conns: 8, streams: 8, rates: []int{1000}},
	{name: "tcp", title: "TCP", unit: "message there and back", protocol: load.TCPEcho, conns: 64, streams: 1, rates: []int{1000}, idle: true},
	{name: "mtls_h1_1k", title: "HTTP/1.1, 1 KiB, mTLS through two proxies", unit: "request", protocol: load.HTTP1Small, conns: 64, streams: 1, rates: []int{1000, 5000}, pair: true},
}

// target is what a figure of ours may be, at most, as a share of a peer's.
type target struct {
	scenario, figure, peer string
	atMost                 float64
}

// Figures that targets are about.
const (
	figureCPU   = "CPU"
	figureAdded = "p99 added at 1,000/s"
)

var targets = []target{
	{"h1_1k", figureCPU, "relay", 1.15},
	{"h1_1k", figureCPU, "haproxy", 0.9},
	{"h1_1k", figureCPU, "envoy", 0.4},
	{"h1_1k", figureAdded, "envoy", 0.5},
	{"h1_64k", figureCPU, "relay", 1.15},
	{"h1_64k", figureCPU, "haproxy", 0.9},
	{"h1_64k", figureCPU, "envoy", 0.4},
	{"grpc_unary", figureCPU, "envoy", 0.6},
	{"mtls_h1_1k", figureCPU, "envoy", 0.7},
}

// Limits of ours that are no ratios.
const (
	maxIdleKB    = 20 << 10 // resident without connections
	maxIdleBytes = 1 << 10  // heap for each idle connection, beside its goroutine
)
