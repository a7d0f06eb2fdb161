// Command outrigger-cni has meshed pods' traffic led to their proxies from the
// node, so that pods need no privilege. It is two programs in one file: the
// plugin, which a container runtime runs for every pod, and its installer, which
// a DaemonSet runs on every node and which copies this file to where the runtime
// finds it.
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"

	"github.com/outrigger-mesh/outrigger/program"
	"github.com/outrigger-mesh/outrigger/sidecar/cni/internal/install"
	"github.com/outrigger-mesh/outrigger/sidecar/cni/internal/plugin"
)

func main() {
	// Only a container runtime sets this.
	if os.Getenv("CNI_COMMAND") != "" { //nolint:forbidigo // this is main
		os.Exit(plugin.Main(os.Stdout, os.Stderr)) //nolint:forbidigo // this is main
	}
	program.Main(plugin.Name, run)
}

const usage = "write outrigger-cni install (a DaemonSet does, and it goes on until it is told to end) or outrigger-cni uninstall; --help behind either lists its flags. Without them it is a CNI plugin, which a container runtime runs"

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		return fmt.Errorf("nothing to do: %s", usage)
	}
	env := install.Environment{APIServer: apiServer()}
	switch args[0] {
	case "install":
		return install.Run(ctx, args[1:], env, stdout, stderr)
	case "uninstall":
		return install.Uninstall(args[1:], env, stdout, stderr)
	case "--version", "-version":
		_, err := fmt.Fprintln(stdout, plugin.Name, program.Version())
		return err
	}
	return fmt.Errorf("%q: %s", args[0], usage)
}

// apiServer is what Kubernetes tells every pod.
func apiServer() string {
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT") //nolint:forbidigo // this is main
	if host == "" || port == "" {
		return ""
	}
	return "https://" + net.JoinHostPort(host, port)
}
