// Package outlier decides which endpoints are ejected from load balancing and
// when they return: Envoy's outlier detection, with the arithmetic of every
// decision. It knows neither requests nor connections; upstream tells it results
// and asks whom to leave out.
//
// It is pure: the time of every event is an argument. One Detector serves one
// cluster; its owner serialises the calls.
package outlier

import "time"

// Policy with defaults filled in. A counter of zero is not used.
type Policy struct {
	Consecutive5xx           uint32
	ConsecutiveGatewayErrors uint32
	Interval                 time.Duration
	BaseEjectionTime         time.Duration
	MaxEjectionPercent       uint32
	FailurePercentage        FailurePercentage
	// Observe detects and counts, and ejects nothing.
	Observe bool
}

// FailurePercentage with Threshold 0 is not used.
type FailurePercentage struct {
	Threshold     uint32
	MinimumHosts  uint32
	RequestVolume uint32
}
