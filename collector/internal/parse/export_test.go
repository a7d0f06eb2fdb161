package parse

import (
	"maps"
	"slices"
)

// Patterns are the names that grok knows.
func Patterns() []string { return slices.Sorted(maps.Keys(library())) }
