//go:build race

package webhook

// raceOn: the race detector multiplies the work.
const raceOn = true
