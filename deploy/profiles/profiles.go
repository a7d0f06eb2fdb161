// Package profiles holds the values of the chart that differ from one kind of
// Kubernetes to another, each with its reason. It knows no more of them than
// that; the command line and the tests of the chart read them.
package profiles

import (
	"embed"
	"fmt"
	"slices"
	"strings"
)

//go:embed *.yaml
var files embed.FS

// Names of the profiles, sorted.
func Names() []string {
	entries, err := files.ReadDir(".")
	if err != nil {
		return nil // there is always a root
	}
	var names []string
	for _, e := range entries {
		names = append(names, strings.TrimSuffix(e.Name(), ".yaml"))
	}
	slices.Sort(names)
	return names
}

// Read returns the values of a profile, in YAML.
func Read(name string) ([]byte, error) {
	b, err := files.ReadFile(name + ".yaml")
	if err != nil {
		return nil, fmt.Errorf("there is no profile %q; there are %s", name, strings.Join(Names(), ", "))
	}
	return b, nil
}
