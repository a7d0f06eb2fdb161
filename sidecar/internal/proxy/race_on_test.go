//go:build race

package proxy_test

// The race detector makes sync.Pool drop at random, so counts mean nothing.
const raceEnabled = true
