//go:build !race

package webhook

const raceOn = false
