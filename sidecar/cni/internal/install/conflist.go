package install

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/outrigger-mesh/outrigger/sidecar/cni/internal/plugin"
)

const (
	// generated is our own list, made of a configuration that names one plugin
	// and no list. It sorts before what others write, so that runtimes take it.
	generated = "00-" + plugin.Name + ".conflist"
	// maxConfig of one CNI configuration, in bytes.
	maxConfig = 1 << 20
	// minVersion of CNI whose lists hand results on.
	minVersion = "0.3.0"
)

// errNoConfig says that the network of the node has not been set up yet.
var errNoConfig = errors.New("there is no CNI configuration yet: the node's network plugin has not written one")

// object is a JSON object whose values are kept as they are written.
type object map[string]json.RawMessage

// readConfig reads a CNI configuration; list says whether it is one of several
// plugins.
func readConfig(path string) (raw []byte, o object, list bool, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, nil, false, err
	}
	if info.Size() > maxConfig {
		return nil, nil, false, fmt.Errorf("%s has %d bytes: at most %d", path, info.Size(), maxConfig)
	}
	if raw, err = os.ReadFile(path); err != nil {
		return nil, nil, false, err
	}
	if err := json.Unmarshal(raw, &o); err != nil {
		return nil, nil, false, fmt.Errorf("%s: %w; container runtimes refuse it too", path, err)
	}
	_, list = o["plugins"]
	if _, single := o["type"]; !list && !single {
		return nil, nil, false, fmt.Errorf("%s has neither plugins nor a type, so it is no CNI configuration", path)
	}
	return raw, o, list, nil
}

// active is the file that container runtimes take: the first by name, ours
// aside. With name it is that one.
func active(dir, name string) (string, error) {
	if name != "" {
		path := filepath.Join(dir, name)
		if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
			return "", fmt.Errorf("%s: %w", path, errNoConfig)
		}
		return path, nil
	}
	files, err := configs(dir)
	if err != nil {
		return "", err
	}
	for _, f := range files {
		if filepath.Base(f) != generated {
			return f, nil
		}
	}
	return "", fmt.Errorf("%s: %w", dir, errNoConfig)
}

// configs are the files of dir that container runtimes read, in their order.
func configs(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range entries {
		switch filepath.Ext(e.Name()) {
		case ".conf", ".conflist", ".json":
			if !e.IsDir() {
				out = append(out, filepath.Join(dir, e.Name()))
			}
		}
	}
	slices.Sort(out)
	return out, nil
}

// chain returns o, a list, with entry in it once: where it was, else behind all
// others. changed is false where it is so already.
func chain(o object, entry json.RawMessage) (_ object, changed bool, err error) {
	plugins, at, err := others(o)
	if err != nil {
		return nil, false, err
	}
	if len(plugins) == 0 {
		return nil, false, errors.New("it has no plugin but ours, so nothing gives pods a network")
	}
	if v := versionOf(o); v < minVersion {
		return nil, false, fmt.Errorf("cniVersion %q has no chained plugins: the node's network plugin has to be configured with %s or later", v, minVersion)
	}
	if len(at) > 0 && at[0] > 0 {
		plugins = slices.Insert(plugins, at[0], entry)
	} else {
		plugins = append(plugins, entry)
	}
	return replace(o, plugins)
}

// unchain returns o without our entry.
func unchain(o object) (object, bool, error) {
	plugins, at, err := others(o)
	if err != nil || len(at) == 0 {
		return o, false, err
	}
	return replace(o, plugins)
}

// others are the plugins of a list that are not ours, and where ours are.
func others(o object) (plugins []json.RawMessage, ours []int, err error) {
	var all []json.RawMessage
	if err := json.Unmarshal(o["plugins"], &all); err != nil {
		return nil, nil, fmt.Errorf("field plugins: %w", err)
	}
	for i, p := range all {
		var typed struct {
			Type string `json:"type"`
		}
		if err := json.Unmarshal(p, &typed); err != nil {
			return nil, nil, fmt.Errorf("field plugins[%d]: %w", i, err)
		}
		if typed.Type == plugin.Name {
			ours = append(ours, i)
		} else {
			plugins = append(plugins, p)
		}
	}
	return plugins, ours, nil
}

// versionOf a configuration; without one it is the oldest.
func versionOf(o object) string {
	var v string
	if err := json.Unmarshal(o["cniVersion"], &v); err != nil || v == "" {
		return "0.1.0"
	}
	return v
}

func replace(o object, plugins []json.RawMessage) (object, bool, error) {
	b, err := json.Marshal(plugins)
	if err != nil {
		return nil, false, err
	}
	var before bytes.Buffer
	if err := json.Compact(&before, o["plugins"]); err != nil {
		return nil, false, err
	}
	out := object{}
	for k, v := range o {
		out[k] = v
	}
	out["plugins"] = b
	return out, !bytes.Equal(before.Bytes(), b), nil
}

// listOf is a list with the one plugin of single, and its name and version.
func listOf(single object) (object, error) {
	one := object{}
	for k, v := range single {
		if k != "name" && k != "cniVersion" {
			one[k] = v
		}
	}
	b, err := json.Marshal([]object{one})
	if err != nil {
		return nil, err
	}
	out := object{"plugins": b}
	for _, k := range []string{"name", "cniVersion"} {
		if v, ok := single[k]; ok {
			out[k] = v
		}
	}
	return out, nil
}

func encode(o object) ([]byte, error) {
	b, err := json.MarshalIndent(o, "", "  ")
	return append(b, '\n'), err
}
