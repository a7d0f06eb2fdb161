// Package plugin is what a container runtime runs for every pod, behind the
// plugin that gave the pod its network: it has a meshed pod's traffic led to the
// proxy, so that the pod itself needs no privilege.
//
// It fails closed: where it cannot find out whether a pod is meshed, or cannot
// set the rules of one that is, the pod does not start, with the reason as an
// event of the pod; kubelet tries again. It knows CNI (specification 1.1) and
// the annotations of pods; the rules and how they are set are those of netinit.
// The command's main calls it; package install configures it.
package plugin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/vishvananda/netns"

	"github.com/outrigger-mesh/outrigger/sidecar/cni/internal/pods"
	"github.com/outrigger-mesh/outrigger/sidecar/netinit/redirect"
	"github.com/outrigger-mesh/outrigger/sidecar/netinit/rules"
)

const (
	// Name of the plugin, its binary and its entry in a CNI configuration.
	Name = "outrigger-cni"
	// Kubeconfig is the name of the file beside the binary that says where the
	// API server is. There the plugin finds it by itself, however the folders of
	// a node are mounted into the installer.
	Kubeconfig = Name + ".kubeconfig"
	// timeout of one call; container runtimes wait for minutes.
	timeout = 30 * time.Second
)

// What the injector writes on pods and into them.
const (
	annotationStatus  = "outrigger.dev/status" // the plugin captures pods that say injected
	statusInjected    = "injected"
	containerProxy    = "outrigger-proxy"
	annotationCapture = "outrigger.dev/capture"       // false: the plugin leaves the pod alone
	annotationMirror  = "kubernetes.io/config.mirror" // on what the API server shows of a static pod
)

// Versions of CNI that let plugins be chained.
var versions = version.PluginSupports("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")

// Config is the plugin's entry in a CNI configuration, less what CNI itself puts
// into it.
type Config struct {
	// ExcludeNamespaces are let pass without asking the API server.
	ExcludeNamespaces []string `json:"excludeNamespaces,omitempty"`
	// ProxyUID and Backend as netinit's flags.
	ProxyUID uint32           `json:"proxyUID"`
	Backend  redirect.Backend `json:"backend"`
}

// Entry is c as an entry of a list of plugins.
func (c Config) Entry() (json.RawMessage, error) {
	return json.Marshal(struct {
		Type string `json:"type"`
		Mesh Config `json:"outrigger"`
	}{Name, c})
}

// Main serves one call, which the environment and stdin describe, and returns
// the exit code. Errors are written to stdout as JSON, as CNI has it.
func Main(stdout, stderr io.Writer) int {
	return served(skel.PluginMainFuncsWithError(funcs(stdout, stderr), versions, Name), stdout, stderr)
}

func funcs(stdout, stderr io.Writer) skel.CNIFuncs {
	log := slog.New(slog.NewTextHandler(stderr, nil))
	return skel.CNIFuncs{
		Add:    func(a *skel.CmdArgs) error { return add(a, stdout, log) },
		Check:  func(a *skel.CmdArgs) error { return check(a, log) },
		Del:    func(*skel.CmdArgs) error { return nil }, // rules go with their namespace
		GC:     func(*skel.CmdArgs) error { return nil },
		Status: status,
	}
}

func served(e *types.Error, stdout, stderr io.Writer) int {
	if e == nil {
		return 0
	}
	if err := json.NewEncoder(stdout).Encode(e); err != nil {
		fmt.Fprintln(stderr, Name+":", err)
	}
	return 1
}

// call is what one call is about.
type call struct {
	conf    types.PluginConf
	mesh    Config
	dir     string // of the binary
	podArgs podArgs
}

// podArgs are what kubelet's runtimes say of the pod in CNI_ARGS, in fields of the
// same names.
type podArgs struct {
	types.CommonArgs
	K8S_POD_NAMESPACE types.UnmarshallableString
	K8S_POD_NAME      types.UnmarshallableString
	K8S_POD_UID       types.UnmarshallableString
}

func parse(a *skel.CmdArgs) (call, error) {
	var c call
	var own struct {
		Mesh json.RawMessage `json:"outrigger"`
	}
	if err := json.Unmarshal(a.StdinData, &c.conf); err != nil {
		return c, types.NewError(types.ErrDecodingFailure, "configuration of "+Name, err.Error())
	}
	if err := json.Unmarshal(a.StdinData, &own); err != nil {
		return c, types.NewError(types.ErrDecodingFailure, "configuration of "+Name, err.Error())
	}
	c.mesh = Config{ProxyUID: rules.ProxyUID, Backend: redirect.Auto}
	if own.Mesh != nil {
		d := json.NewDecoder(strings.NewReader(string(own.Mesh)))
		d.DisallowUnknownFields()
		if err := d.Decode(&c.mesh); err != nil {
			return c, types.NewError(types.ErrInvalidNetworkConfig, Name+`: field "outrigger"`, err.Error())
		}
	}
	c.podArgs.IgnoreUnknown = true
	if err := types.LoadArgs(a.Args, &c.podArgs); err != nil {
		return c, types.NewError(types.ErrInvalidEnvironmentVariables, "CNI_ARGS", err.Error())
	}
	exe, err := os.Executable()
	if err != nil {
		return c, fmt.Errorf("find out where %s is: %w", Name, err)
	}
	c.dir = filepath.Dir(exe)
	return c, nil
}

func add(a *skel.CmdArgs, stdout io.Writer, log *slog.Logger) error {
	c, err := parse(a)
	if err != nil {
		return err
	}
	if err := version.ParsePrevResult(&c.conf); err != nil {
		return types.NewError(types.ErrDecodingFailure, Name+": prevResult", err.Error())
	}
	if c.conf.PrevResult == nil {
		return types.NewError(types.ErrInvalidNetworkConfig, Name+" is not the first plugin: it comes behind the one that gives pods their network", "move it to the end of the list of plugins, where outrigger-cni install puts it")
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	cfg, meshed, err := c.decide(ctx)
	if err != nil {
		return err
	}
	if meshed {
		err := inside(a.Netns, func() error {
			if _, err := redirect.Apply(ctx, cfg, c.mesh.Backend, log); err != nil {
				return err
			}
			_, err := redirect.Verify(ctx, cfg)
			return err
		})
		if err != nil {
			return fmt.Errorf("%s: pod %s/%s is meshed and its traffic cannot be captured, so it does not start: %w", Name, c.podArgs.K8S_POD_NAMESPACE, c.podArgs.K8S_POD_NAME, err)
		}
	}
	result, err := c.conf.PrevResult.GetAsVersion(c.conf.CNIVersion)
	if err != nil {
		return err
	}
	return result.PrintTo(stdout)
}

// check says whether a meshed pod still has its rules.
func check(a *skel.CmdArgs, _ *slog.Logger) error {
	c, err := parse(a)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	cfg, meshed, err := c.decide(ctx)
	if err != nil || !meshed {
		return err
	}
	return inside(a.Netns, func() error {
		_, err := redirect.Verify(ctx, cfg)
		return err
	})
}

// status says whether the plugin could do its work (CNI 1.1).
func status(*skel.CmdArgs) error {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	if _, err := pods.Load(filepath.Join(filepath.Dir(exe), Kubeconfig)); err != nil {
		return types.NewError(types.ErrPluginNotAvailable, Name+" has no credentials: does its DaemonSet run on this node?", err.Error())
	}
	return nil
}

// decide finds out whether the pod is meshed, and what of it is captured.
func (c call) decide(ctx context.Context) (rules.Config, bool, error) {
	namespace, name, uid := string(c.podArgs.K8S_POD_NAMESPACE), string(c.podArgs.K8S_POD_NAME), string(c.podArgs.K8S_POD_UID)
	if namespace == "" || name == "" {
		return rules.Config{}, false, nil // no pod, as nerdctl's containers
	}
	if slices.Contains(c.mesh.ExcludeNamespaces, namespace) {
		return rules.Config{}, false, nil
	}
	fail := func(err error, remedy string) (rules.Config, bool, error) {
		return rules.Config{}, false, types.NewError(types.ErrTryAgainLater, fmt.Sprintf("%s cannot find out whether pod %s/%s is meshed, so it does not start: %v", Name, namespace, name, err), remedy)
	}
	k, err := pods.Load(filepath.Join(c.dir, Kubeconfig))
	if err != nil {
		return fail(err, "does the DaemonSet outrigger-cni run on this node, and is it ready? To do without it, run outrigger-cni uninstall on the node")
	}
	pod, err := pods.Get(ctx, k, namespace, name)
	switch {
	case errors.Is(err, pods.ErrUnauthorized):
		return fail(err, "the token expired because the DaemonSet outrigger-cni does not run on this node: see its pod there")
	case errors.Is(err, pods.ErrNotFound):
		return fail(err, "the pod was deleted meanwhile, or it is a static one that the API server will know soon")
	case err != nil:
		return fail(err, "is the API server reached from this node, and may the ServiceAccount outrigger-cni get pods?")
	}
	if _, static := pod.Annotations[annotationMirror]; static {
		return rules.Config{}, false, nil // the injector sees no static pods
	}
	if uid != "" && uid != pod.UID {
		return fail(fmt.Errorf("the API server has another pod of that name (uid %s, not %s)", pod.UID, uid), "the pod was replaced meanwhile")
	}
	if pod.Annotations[annotationStatus] != statusInjected || !slices.Contains(pod.Containers, containerProxy) {
		return rules.Config{}, false, nil
	}
	switch v, set := pod.Annotations[annotationCapture]; {
	case v == "false":
		return rules.Config{}, false, nil
	case set && v != "true":
		return fail(fmt.Errorf("annotation %s=%q", annotationCapture, v), "write true or false")
	}
	cfg, err := captured(pod.Annotations, c.mesh.ProxyUID)
	if err != nil {
		return rules.Config{}, false, types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("%s: pod %s/%s: %v", Name, namespace, name, err), "correct the annotation in the pod's template")
	}
	return cfg, true, nil
}

// captured reads the annotations that netinit has flags for.
func captured(annotations map[string]string, uid uint32) (rules.Config, error) {
	c := rules.Default()
	c.ProxyUID = uid
	var errs []error
	errs = append(errs,
		read(annotations, "outrigger.dev/exclude-inbound-ports", rules.ParsePorts, &c.ExcludeInboundPorts),
		read(annotations, "outrigger.dev/exclude-outbound-ports", rules.ParsePorts, &c.ExcludeOutboundPorts),
		read(annotations, "outrigger.dev/exclude-outbound-cidrs", rules.ParseCIDRs, &c.ExcludeOutboundCIDRs),
		read(annotations, "outrigger.dev/include-outbound-cidrs", rules.ParseCIDRs, &c.IncludeOutboundCIDRs),
	)
	if err := errors.Join(errs...); err != nil {
		return c, err
	}
	return c, c.Validate()
}

func read[T any](annotations map[string]string, key string, parse func(string) ([]T, error), to *[]T) error {
	v, err := parse(annotations[key])
	if err != nil {
		return fmt.Errorf("annotation %s=%.100q: %w", key, annotations[key], err)
	}
	*to = v
	return nil
}

// inside runs fn on a thread in a network namespace. The thread ends with it, so
// that no other goroutine ever finds itself in there.
func inside(path string, fn func() error) error {
	ended := make(chan error)
	go func() {
		runtime.LockOSThread() // and not unlocked
		ended <- func() error {
			ns, err := netns.GetFromPath(path)
			if err != nil {
				return fmt.Errorf("network namespace %s: %w", path, err)
			}
			defer func() { _ = ns.Close() }()
			if err := netns.Set(ns); err != nil {
				return fmt.Errorf("enter network namespace %s: %w", path, err)
			}
			return fn()
		}()
	}()
	return <-ended
}
