// Package apptest tests the programs as they are shipped: it builds the
// binaries and runs them on loopback, with the shop of the demo as the
// applications, and looks at them only through their ports, files, logs and
// exit codes. It needs no cluster.
//
// One scenario (steps_test.go) is played on each kind of proxy, our sidecar
// and a real Envoy, driven by the same control plane with the same policies:
// what both do is proved to be the same, and where they differ the step says
// so. A stock gRPC client is driven too.
//
// Knobs, all environment variables:
//
//	OUTRIGGER_BIN            folder with control-plane, sidecar and shop; default: they are built
//	OUTRIGGER_ENVOY          an Envoy; default .cache/envoy/envoy, which envoy.sh installs
//	OUTRIGGER_REQUIRE_ENVOY  1 turns what would be skipped for want of an Envoy into a failure
//
// It imports no internal package of ours: only the contract that says what a
// proxy is told at birth.
package apptest
