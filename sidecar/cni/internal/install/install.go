// Package install puts the CNI plugin on a node and keeps it there: its binary,
// what it reaches the API server with, and its entry in the CNI configuration
// that the node's own network plugin wrote, and writes again when it pleases.
//
// Every file changes at once, by a rename. What others wrote into the
// configuration is kept as it is. The command's main calls it, in a DaemonSet.
package install

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/outrigger-mesh/outrigger/program"
	"github.com/outrigger-mesh/outrigger/sidecar/cni/internal/plugin"
	"github.com/outrigger-mesh/outrigger/sidecar/cni/internal/pods"
	"github.com/outrigger-mesh/outrigger/sidecar/netinit/redirect"
	"github.com/outrigger-mesh/outrigger/sidecar/netinit/rules"
)

const (
	account = "/var/run/secrets/kubernetes.io/serviceaccount/"
	// settle is how long a folder is left alone after a change in it, and the
	// least between two looks: who fights with us for a file does so once a
	// second at most.
	settle = time.Second
	// fights in fightWithin are worth a warning.
	fights      = 5
	fightWithin = time.Minute
)

// Environment is what the process finds around it.
type Environment struct {
	APIServer string // https://host:port; empty outside of a cluster
}

type config struct {
	program.Flags
	binDir, confDir, conflist string
	tokenFile, caFile         string
	apiServer                 string
	health, readyFile         string
	interval                  time.Duration
	removeOnExit              bool
	mesh                      plugin.Config
}

func parse(name string, args []string, env Environment, stdout, stderr io.Writer) (config, error) {
	c := config{mesh: plugin.Config{ProxyUID: rules.ProxyUID}}
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	fs.SetOutput(stderr)
	c.Register(fs)
	fs.StringVar(&c.binDir, "bin-dir", "/opt/cni/bin", "folder that the container runtime runs CNI plugins from, where it is mounted")
	fs.StringVar(&c.confDir, "conf-dir", "/etc/cni/net.d", "folder that the container runtime reads CNI configuration from, where it is mounted")
	if name == "uninstall" {
		return c, c.Parse(fs, args, stdout)
	}
	fs.StringVar(&c.conflist, "conflist", "", "name of the CNI configuration to join. Empty: the first one, which is what runtimes take")
	fs.StringVar(&c.tokenFile, "token-file", account+"token", "token of a ServiceAccount that may get pods")
	fs.StringVar(&c.caFile, "ca-file", account+"ca.crt", "certificate authority of the API server")
	fs.StringVar(&c.apiServer, "api-server", env.APIServer, "API server as it is reached from the node, https://<host>:<port>. Default: what Kubernetes tells a pod")
	fs.StringVar(&c.health, "health-address", ":15021", "serves /ready, /healthz and /metrics. Empty: none")
	fs.StringVar(&c.readyFile, "ready-file", "", "file that exists while the plugin is installed. Empty: none")
	fs.DurationVar(&c.interval, "interval", 30*time.Second, "how often to look, besides whenever something changes")
	fs.BoolVar(&c.removeOnExit, "remove-on-exit", false, "on SIGTERM remove the plugin from the node; pods that start from then on are not captured. Without it, the plugin goes on working until its token expires")
	fs.Func("exclude-namespaces", "comma list of namespaces that the plugin does not look at, so that what a cluster runs on starts without the API server (default kube-system,outrigger-system)", func(s string) error {
		c.mesh.ExcludeNamespaces = strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ' ' })
		return nil
	})
	c.mesh.ExcludeNamespaces = []string{"kube-system", "outrigger-system"}
	fs.TextVar(&c.mesh.Backend, "backend", redirect.Auto, "how rules are set: auto, nftables or iptables (the node's)")
	fs.Func("proxy-uid", "user id of the proxies (default 1337)", func(s string) error {
		uids, err := rules.ParseUIDs(s)
		if err != nil || len(uids) != 1 || uids[0] == 0 {
			return fmt.Errorf("%q is not a user id above 0", s)
		}
		c.mesh.ProxyUID = uids[0]
		return nil
	})
	if err := c.Parse(fs, args, stdout); err != nil {
		return c, err
	}
	switch {
	case c.apiServer == "":
		return c, errors.New("--api-server is empty and this is no pod of a cluster: write https://<host>:<port>")
	case !strings.HasPrefix(c.apiServer, "https://"):
		return c, fmt.Errorf("--api-server %q: write https://<host>:<port>; a token is not sent in clear", c.apiServer)
	case c.interval < time.Second:
		return c, fmt.Errorf("--interval %s: write 1s or more", c.interval)
	case c.conflist != filepath.Base(c.conflist) && c.conflist != "":
		return c, fmt.Errorf("--conflist %q: write the name of a file in --conf-dir", c.conflist)
	}
	return c, nil
}

type installer struct {
	config
	self string // this program's file
	log  *slog.Logger
	// state is what ready answers.
	state   atomic.Pointer[error]
	repairs []time.Time
}

// Run installs the plugin and keeps it installed until ctx ends.
func Run(ctx context.Context, args []string, env Environment, stdout, stderr io.Writer) error {
	c, err := parse("install", args, env, stdout, stderr)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program's file: %w", err)
	}
	i := &installer{config: c, self: self, log: c.Log(plugin.Name, stderr)}
	starting := errors.New("starting")
	i.state.Store(&starting)
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	served := make(chan error, 1)
	if c.health == "" {
		close(served)
	} else {
		l, err := program.Listen(ctx, "--health-address", c.health)
		if err != nil {
			return err
		}
		go func() { defer close(served); defer stop(); served <- i.serve(ctx, l) }()
	}
	err = i.watch(ctx)
	stop()
	err = errors.Join(err, <-served)
	if c.readyFile != "" {
		err = errors.Join(err, remove(c.readyFile))
	}
	if c.removeOnExit {
		err = errors.Join(err, i.uninstall())
	}
	return err
}

func (i *installer) serve(ctx context.Context, l net.Listener) error {
	mux := http.NewServeMux()
	program.Operate(mux, i.ready, program.Registry(), i.log)
	return program.Serve(ctx, l, mux, i.log)
}

func (i *installer) ready() error { return *i.state.Load() }

// watch looks after the plugin whenever something changes, and now and then.
func (i *installer) watch(ctx context.Context) error {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch folders: %w", err)
	}
	defer func() { _ = w.Close() }()
	watched := map[string]bool{}
	tick := time.NewTicker(i.interval)
	defer tick.Stop()
	for {
		for _, dir := range []string{i.confDir, i.binDir, filepath.Dir(i.tokenFile)} {
			if !watched[dir] {
				watched[dir] = w.Add(dir) == nil // else the ticker has to do
			}
		}
		i.look()
		// What comes within settle, our own doing first of all, is looked at once.
		again := false
		for settled := time.After(settle); settled != nil; {
			select {
			case <-ctx.Done():
				return nil
			case <-settled:
				settled = nil
			case <-w.Events:
				again = true
			case err := <-w.Errors:
				i.log.Warn("watching folders", "error.message", err.Error())
			}
		}
		if again {
			continue
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case e := <-w.Events:
			i.log.Debug("something changed", "file.path", e.Name)
		case err := <-w.Errors:
			i.log.Warn("watching folders", "error.message", err.Error())
		}
	}
}

// look installs what is missing and says so, and keeps the state.
func (i *installer) look() {
	changed, err := i.install()
	for _, what := range changed {
		i.log.Info("installed "+what, "file.path", i.path(what))
	}
	if slices.Contains(changed, configuration) {
		i.fight()
	}
	if before := i.ready(); err != nil && (before == nil || before.Error() != err.Error()) {
		i.log.Warn("the plugin is not installed", "error.message", err.Error())
	} else if err == nil && before != nil {
		i.log.Info("the plugin is installed")
	}
	if i.readyFile != "" {
		var ferr error
		if err == nil {
			_, ferr = ensure(i.readyFile, []byte("ready\n"), 0o644)
		} else {
			ferr = remove(i.readyFile)
		}
		if ferr != nil {
			i.log.Warn("--ready-file", "file.path", i.readyFile, "error.message", ferr.Error())
		}
	}
	i.state.Store(&err)
}

// fight warns when somebody takes our entry out again and again.
func (i *installer) fight() {
	now := time.Now()
	i.repairs = append(i.repairs, now)
	i.repairs = slices.DeleteFunc(i.repairs, func(t time.Time) bool { return now.Sub(t) > fightWithin })
	if len(i.repairs) > fights {
		i.log.Warn(fmt.Sprintf("the CNI configuration was written %d times within %s: another program owns it and takes outrigger-cni out again; tell it to share (Cilium: cni.exclusive=false), or name another file with --conflist", len(i.repairs), fightWithin), "file.path", i.confDir)
	}
}

// What is installed, in this order: with the configuration the plugin comes into
// force, and then has to have the rest.
const (
	binary        = "binary"
	credentials   = "credentials"
	configuration = "configuration"
)

func (i *installer) path(what string) string {
	switch what {
	case binary:
		return filepath.Join(i.binDir, plugin.Name)
	case credentials:
		return filepath.Join(i.binDir, plugin.Kubeconfig)
	}
	return i.confDir
}

func (i *installer) install() (changed []string, err error) {
	for _, step := range []struct {
		what string
		do   func() (bool, error)
	}{{binary, i.installBinary}, {credentials, i.installCredentials}, {configuration, i.installConfiguration}} {
		did, err := step.do()
		if err != nil {
			return changed, fmt.Errorf("install the plugin's %s: %w", step.what, err)
		}
		if did {
			changed = append(changed, step.what)
		}
	}
	return changed, nil
}

func (i *installer) installBinary() (bool, error) {
	to := i.path(binary)
	if ok, err := same(i.self, to); ok || err != nil {
		return false, err
	}
	b, err := os.ReadFile(i.self)
	if err != nil {
		return false, err
	}
	return true, write(to, b, 0o755, nil)
}

func (i *installer) installCredentials() (bool, error) {
	token, err := os.ReadFile(i.tokenFile)
	if err != nil {
		return false, fmt.Errorf("--token-file: %w", err)
	}
	ca, err := os.ReadFile(i.caFile)
	if err != nil {
		return false, fmt.Errorf("--ca-file: %w", err)
	}
	k := pods.Config{Server: i.apiServer, CA: ca, Token: strings.TrimSpace(string(token))}
	if k.Token == "" {
		return false, fmt.Errorf("--token-file %s is empty", i.tokenFile)
	}
	b, err := k.Encode()
	if err != nil {
		return false, err
	}
	return ensure(i.path(credentials), b, 0o600)
}

func (i *installer) installConfiguration() (bool, error) {
	path, err := active(i.confDir, i.conflist)
	if err != nil {
		return false, err
	}
	raw, o, list, err := readConfig(path)
	if err != nil {
		return false, err
	}
	entry, err := i.mesh.Entry()
	if err != nil {
		return false, err
	}
	own := filepath.Join(i.confDir, generated)
	if !list {
		if o, err = listOf(o); err != nil {
			return false, fmt.Errorf("%s: %w", path, err)
		}
		if o, _, err = chain(o, entry); err != nil {
			return false, fmt.Errorf("%s: %w", path, err)
		}
		b, err := encode(o)
		if err != nil {
			return false, err
		}
		return ensure(own, b, 0o644)
	}
	o, changed, err := chain(o, entry)
	if err != nil {
		return false, fmt.Errorf("%s: %w", path, err)
	}
	if changed {
		b, err := encode(o)
		if err != nil {
			return false, err
		}
		if err := write(path, b, 0o644, raw); err != nil {
			return false, err
		}
	}
	// What was made of a configuration that is a list now, or that is gone.
	return changed, remove(own)
}

// Uninstall removes the plugin from the node, for who cannot have the DaemonSet
// do so.
func Uninstall(args []string, env Environment, stdout, stderr io.Writer) error {
	c, err := parse("uninstall", args, env, stdout, stderr)
	if err != nil {
		return err
	}
	i := &installer{config: c, log: c.Log(plugin.Name, stderr)}
	return i.uninstall()
}

// uninstall takes away in the reverse order: a runtime must not look for a
// plugin that is gone.
func (i *installer) uninstall() error {
	files, err := configs(i.confDir)
	if err != nil {
		return fmt.Errorf("uninstall: %w", err)
	}
	var errs []error
	for _, path := range files {
		if filepath.Base(path) == generated {
			errs = append(errs, remove(path))
			continue
		}
		errs = append(errs, i.leave(path))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("uninstall: %w; the plugin's binary and credentials stay, because a configuration that names it may remain", err)
	}
	if err := errors.Join(remove(i.path(credentials)), remove(i.path(binary))); err != nil {
		return fmt.Errorf("uninstall: %w", err)
	}
	i.log.Info("the plugin is removed from this node")
	return nil
}

// leave takes our entry out of a configuration. One that is broken has none that
// a runtime would follow.
func (i *installer) leave(path string) error {
	for {
		raw, o, list, err := readConfig(path)
		if err != nil || !list {
			return nil //nolint:nilerr // see above
		}
		o, changed, err := unchain(o)
		if err != nil || !changed {
			return nil //nolint:nilerr // see above
		}
		b, err := encode(o)
		if err != nil {
			return err
		}
		if err := write(path, b, 0o644, raw); !errors.Is(err, errRaced) {
			return err
		}
	}
}

func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
