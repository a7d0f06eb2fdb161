// Package breaker decides whether a destination may be called: the
// service-level circuit breaker that each calling workload keeps.
package breaker
