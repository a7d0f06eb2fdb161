// Package measure is the arithmetic of the benchmark: a latency histogram, what
// /proc says of a process, and medians with their spread.
//
// It knows numbers and text, not processes: whoever measures reads the files
// and the clocks. Nothing in it is safe for concurrent use.
package measure
