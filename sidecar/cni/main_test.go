package main

import (
	"errors"
	"flag"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestSubcommands(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{nil, "outrigger-cni install"},
		{[]string{"instal"}, `"instal"`},
		{[]string{"install"}, "--api-server is empty"},
		{[]string{"install", "x"}, `unexpected argument "x"`},
		{[]string{"uninstall", "--conf-dir=/nowhere/at/all"}, "/nowhere/at/all"},
	} {
		if err := run(t.Context(), c.args, io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: %v, want %q", c.args, err, c.want)
		}
	}
	if err := run(t.Context(), []string{"--version"}, io.Discard, io.Discard); err != nil {
		t.Error(err)
	}
	if err := run(t.Context(), []string{"install", "--help"}, io.Discard, io.Discard); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("err = %v", err)
	}
}

// The file as it is installed: static, because a node's libraries are not the
// image's; small, because it runs for every pod; and a plugin by its environment.
func TestTheBinary(t *testing.T) {
	const most = 16 << 20
	path := filepath.Join(t.TempDir(), "outrigger-cni")
	build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags=-s -w", "-o", path, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("outrigger-cni has %.1f MB, stripped", float64(info.Size())/1e6)
	if info.Size() > most {
		t.Errorf("outrigger-cni has %d bytes, more than %d", info.Size(), most)
	}
	deps, err := exec.CommandContext(t.Context(), "go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, heavy := range []string{"google.golang.org/grpc", "github.com/envoyproxy/go-control-plane", "k8s.io/", "sigs.k8s.io/"} {
		if strings.Contains(string(deps), "\n"+heavy) {
			t.Errorf("it links %s", heavy)
		}
	}
	plugin := exec.CommandContext(t.Context(), path)
	plugin.Env = append(os.Environ(), "CNI_COMMAND=VERSION")
	if out, err := plugin.CombinedOutput(); err != nil || !strings.Contains(string(out), `"supportedVersions"`) {
		t.Errorf("%v: %s", err, out)
	}
	plugin = exec.CommandContext(t.Context(), path)
	plugin.Env = append(os.Environ(), "CNI_COMMAND=ADD", "CNI_CONTAINERID=c", "CNI_NETNS=/proc/self/ns/net", "CNI_IFNAME=eth0", "CNI_PATH=/x")
	plugin.Stdin = strings.NewReader(`{"cniVersion":"1.0.0","name":"x","type":"outrigger-cni"}`)
	if out, err := plugin.CombinedOutput(); err == nil || !strings.Contains(string(out), `"code":7`) || !strings.Contains(string(out), "not the first plugin") {
		t.Errorf("%v: %s", err, out)
	}
}
