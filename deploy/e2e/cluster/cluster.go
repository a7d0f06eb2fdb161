package cluster

import (
	"context"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"k8s.io/client-go/tools/clientcmd"
)

// Images that the cluster itself needs among those it is given.
const (
	PauseImage   = "outrigger-e2e/pause:here"
	CoreDNSImage = "outrigger-e2e/coredns:here"
)

// Options of a cluster.
type Options struct {
	// Bin is the folder of the programs, Nft that of nft (see deploy/testbed/build.sh).
	Bin, Nft string
	// Images is a tar of all images that pods may use, the two above among them:
	// there is no registry to pull from.
	Images string
	// Report is told what is done, a line at a time.
	Report func(format string, args ...any)
}

// Cluster is a running cluster. Its methods may be called by several at once.
type Cluster struct {
	Config  *rest.Config // of a member of system:masters
	Client  kubernetes.Interface
	Dynamic dynamic.Interface
	Mapper  *restmapper.DeferredDiscoveryRESTMapper
	// Kubeconfig is a file with the same credentials, for use inside.
	Kubeconfig string
	// Logs is the folder of what its programs wrote.
	Logs string

	group *group
	stop  context.CancelFunc
	lost  context.CancelCauseFunc // says that the cluster has lost a node
}

// Node names, and how long things may take on a machine that is busy.
const (
	readyWithin = 3 * time.Minute
)

var nodes = []nodeConfig{
	{Name: "node-1", IP: "172.30.0.11", PodCIDR: "10.244.1.0/24", Zone: "a"},
	{Name: "node-2", IP: "172.30.0.12", PodCIDR: "10.244.2.0/24", Zone: "b"},
}

// Start brings the cluster up and waits until both nodes and DNS are ready. It may be
// called inside only, once. On an error nothing is cleared up: the end of the
// process does that.
func Start(ctx context.Context, o Options) (*Cluster, error) {
	folder := os.Getenv(envFolder)
	if folder == "" {
		return nil, errors.New("not inside the namespaces of a cluster: call Enter first")
	}
	began := time.Now()
	logs := filepath.Join(folder, "logs")
	if err := os.RemoveAll(logs); err != nil {
		return nil, fmt.Errorf("the logs of the last run: %w", err)
	}
	if err := os.MkdirAll(logs, 0o755); err != nil {
		return nil, fmt.Errorf("logs: %w", err)
	}
	p, err := makePKI(filepath.Join(stateFolder(), "pki"))
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(ctx)
	starting, lost := context.WithCancelCause(ctx)
	c := &Cluster{lost: lost, Logs: logs, Kubeconfig: filepath.Join(folder, "kubeconfig"), stop: stop, group: &group{logs: logs, env: os.Environ()}}
	if err := c.controlPlane(ctx, o, p); err != nil {
		return nil, err
	}
	if err := c.connectNodes(ctx, o, p); err != nil {
		return nil, err
	}
	if err := c.clients(p); err != nil {
		return nil, err
	}
	ctx = starting
	if err := WaitFor(ctx, readyWithin, "the API server to be ready", func(ctx context.Context) error {
		_, err := c.Client.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
		return err
	}); err != nil {
		return nil, c.withLog(err, "kube-apiserver")
	}
	o.Report("the API server is ready after %.1f s", time.Since(began).Seconds())
	if err := c.Apply(ctx, coreDNS); err != nil {
		return nil, err
	}
	for _, n := range nodes {
		if err := WaitFor(ctx, readyWithin, n.Name+" to be ready", func(ctx context.Context) error { return c.nodeReady(ctx, n.Name) }); err != nil {
			return nil, c.withLog(c.withLog(err, n.Name+"-kubelet"), n.Name)
		}
	}
	o.Report("two nodes are ready after %.1f s", time.Since(began).Seconds())
	if err := c.Available(ctx, "kube-system", "coredns"); err != nil {
		return nil, err
	}
	o.Report("DNS is ready after %.1f s", time.Since(began).Seconds())
	return c, nil
}

// Stop ends all programs of the cluster. The end of the process does as well.
func (c *Cluster) Stop() {
	c.stop()
	c.group.running.Wait()
}

// WithoutAPI kills the API server, does something, and brings it back whatever became of it.
func (c *Cluster) WithoutAPI(ctx context.Context, do func(context.Context) error) error {
	back, err := c.group.hold("kube-apiserver")
	if err != nil {
		return err
	}
	doErr := do(ctx)
	back()
	return errors.Join(doErr, WaitFor(context.WithoutCancel(ctx), readyWithin, "the API server to be back", func(ctx context.Context) error {
		_, err := c.Client.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
		return err
	}))
}

// StaticPod gives a node the manifest of a pod that its kubelet starts by itself, without
// the API server; an empty text takes it away.
func (c *Cluster) StaticPod(node, name, manifest string) error {
	file := filepath.Join(manifests(filepath.Join(stateFolder(), node)), name+".yaml")
	if manifest == "" {
		if err := os.Remove(file); err != nil {
			return fmt.Errorf("static pod %s of %s: %w", name, node, err)
		}
		return nil
	}
	if err := os.WriteFile(file, []byte(manifest), 0o600); err != nil {
		return fmt.Errorf("static pod %s of %s: %w", name, node, err)
	}
	return nil
}

// NodeLog is what the containers of a pod have written into the files of a node, as its
// kubelet lays them out; it needs no API server.
func (c *Cluster) NodeLog(node, namespace, pod string) (string, error) {
	files, err := filepath.Glob(filepath.Join(stateFolder(), node, "own", "var", "log", "pods", namespace+"_"+pod+"_*", "*", "*.log"))
	if err != nil {
		return "", fmt.Errorf("the logs of %s: %w", node, err)
	}
	var all strings.Builder
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			return "", fmt.Errorf("the logs of %s: %w", node, err)
		}
		all.Write(text)
	}
	return all.String(), nil
}

func makePKI(dir string) (*pki, error) {
	p, err := newPKI(dir)
	if err != nil {
		return nil, err
	}
	apiNames := []string{"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local", "localhost"}
	errs := []error{
		p.leaf("apiserver", pkix.Name{CommonName: "kube-apiserver"}, apiNames, "127.0.0.1", kubernetesIP, apiIP),
		p.leaf("kubelet-client", pkix.Name{CommonName: "kube-apiserver-kubelet-client", Organization: []string{"system:masters"}}, nil),
		p.signingKey("sa"),
	}
	for name, subject := range map[string]pkix.Name{
		"admin":                   {CommonName: "admin", Organization: []string{"system:masters"}},
		"kube-controller-manager": {CommonName: "system:kube-controller-manager"},
		"kube-scheduler":          {CommonName: "system:kube-scheduler"},
		"kube-proxy":              {CommonName: "system:kube-proxy"},
	} {
		errs = append(errs, p.leaf(name, subject, nil), p.kubeconfig(name))
	}
	for _, n := range nodes {
		// The same certificate for the kubelet as client and as server.
		errs = append(errs, p.leaf(n.Name, pkix.Name{CommonName: "system:node:" + n.Name, Organization: []string{"system:nodes"}}, []string{n.Name}, n.IP), p.kubeconfig(n.Name))
	}
	return p, errors.Join(errs...)
}

func (c *Cluster) controlPlane(ctx context.Context, o Options, p *pki) error {
	in := func(name string) string { return filepath.Join(p.dir, name) }
	bin := func(name string) string { return filepath.Join(o.Bin, name) }
	const etcd, peer = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
	kcm, scheduler := in("kube-controller-manager.kubeconfig"), in("kube-scheduler.kubeconfig")
	return errors.Join(
		c.group.keep(ctx, "etcd", bin("etcd"), "--name=e2e", "--data-dir="+filepath.Join(stateFolder(), "etcd"), "--unsafe-no-fsync", "--log-level=warn",
			"--listen-client-urls="+etcd, "--advertise-client-urls="+etcd, "--listen-peer-urls="+peer, "--initial-advertise-peer-urls="+peer, "--initial-cluster=e2e="+peer),
		c.group.keep(ctx, "kube-apiserver", bin("kube-apiserver"), "--etcd-servers="+etcd,
			"--secure-port=6443", "--bind-address=0.0.0.0", "--advertise-address="+apiIP,
			"--service-cluster-ip-range="+serviceCIDR, "--allow-privileged=true",
			"--tls-cert-file="+in("apiserver.crt"), "--tls-private-key-file="+in("apiserver.key"), "--client-ca-file="+in("ca.crt"),
			"--service-account-issuer=https://kubernetes.default.svc.cluster.local", "--service-account-key-file="+in("sa.pub"), "--service-account-signing-key-file="+in("sa.key"),
			"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
			"--kubelet-client-certificate="+in("kubelet-client.crt"), "--kubelet-client-key="+in("kubelet-client.key"),
			"--kubelet-certificate-authority="+in("ca.crt"), "--kubelet-preferred-address-types=InternalIP"),
		c.group.keep(ctx, "kube-controller-manager", bin("kube-controller-manager"),
			"--kubeconfig="+kcm, "--authentication-kubeconfig="+kcm, "--authorization-kubeconfig="+kcm,
			"--leader-elect=false", "--bind-address=127.0.0.1", "--root-ca-file="+in("ca.crt"), "--service-account-private-key-file="+in("sa.key"),
			"--use-service-account-credentials=true", "--cluster-signing-cert-file="+in("ca.crt"), "--cluster-signing-key-file="+in("ca.key"),
			"--allocate-node-cidrs=false", "--cluster-cidr="+podCIDR, "--service-cluster-ip-range="+serviceCIDR),
		c.group.keep(ctx, "kube-scheduler", bin("kube-scheduler"),
			"--kubeconfig="+scheduler, "--authentication-kubeconfig="+scheduler, "--authorization-kubeconfig="+scheduler, "--leader-elect=false", "--bind-address=127.0.0.1"),
	)
}

// connectNodes starts the processes of the nodes and their cables. This namespace
// reaches pods by their addresses, and Services by way of the first node.
func (c *Cluster) connectNodes(ctx context.Context, o Options, p *pki) error {
	for i, n := range nodes {
		n.Bin, n.Nft, n.Logs, n.PKI, n.Images = o.Bin, o.Nft, c.Logs, p.dir, o.Images
		n.State = filepath.Join(stateFolder(), n.Name)
		n.Peers = map[string]string{}
		for _, other := range nodes {
			if other.Name != n.Name {
				n.Peers[other.PodCIDR] = other.IP
			}
		}
		if err := c.startNode(ctx, n); err != nil {
			return err
		}
		routes := []string{n.PodCIDR}
		if i == 0 {
			routes = append(routes, serviceCIDR)
		}
		for _, r := range routes {
			if err := addRoute(r, n.IP); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *Cluster) startNode(ctx context.Context, n nodeConfig) error {
	if err := os.MkdirAll(n.State, 0o755); err != nil {
		return fmt.Errorf("the state of a node: %w", err)
	}
	text, err := json.Marshal(n)
	if err != nil {
		return fmt.Errorf("the configuration of a node: %w", err)
	}
	file := filepath.Join(n.State, "node.json")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		return fmt.Errorf("the configuration of a node: %w", err)
	}
	log, err := os.Create(filepath.Join(c.Logs, n.Name+".log"))
	if err != nil {
		return fmt.Errorf("the log of a node: %w", err)
	}
	defer func() { _ = log.Close() }() // the child has its own
	cmd := exec.CommandContext(ctx, "/proc/self/exe", roleNode, file)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWNET | syscall.CLONE_NEWUTS, Pdeathsig: syscall.SIGKILL, Setpgid: true}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return fmt.Errorf("start %s: %w", n.Name, err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", n.Name, err)
	}
	c.group.running.Go(func() {
		err := cmd.Wait() // its log says why it ended
		if ctx.Err() == nil {
			c.lost(fmt.Errorf("%s has ended: %w", n.Name, err))
		}
	})
	if err := connect(n.Name, cmd.Process.Pid); err != nil {
		return err
	}
	if _, err := io.WriteString(stdin, "go\n"); err != nil {
		return fmt.Errorf("start %s: %w", n.Name, err)
	}
	return nil
}

func (c *Cluster) clients(p *pki) error {
	text, err := os.ReadFile(filepath.Join(p.dir, "admin.kubeconfig"))
	if err != nil {
		return fmt.Errorf("the kubeconfig: %w", err)
	}
	if err := os.WriteFile(c.Kubeconfig, text, 0o600); err != nil {
		return fmt.Errorf("the kubeconfig: %w", err)
	}
	if c.Config, err = clientcmd.RESTConfigFromKubeConfig(text); err != nil {
		return fmt.Errorf("the kubeconfig: %w", err)
	}
	c.Config.QPS, c.Config.Burst = 500, 1000
	if c.Client, err = kubernetes.NewForConfig(c.Config); err != nil {
		return fmt.Errorf("a client: %w", err)
	}
	if c.Dynamic, err = dynamic.NewForConfig(c.Config); err != nil {
		return fmt.Errorf("a client: %w", err)
	}
	c.Mapper = newMapper(c.Client)
	return nil
}

func (c *Cluster) nodeReady(ctx context.Context, name string) error {
	n, err := c.Client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	for _, cond := range n.Status.Conditions {
		if cond.Type == corev1.NodeReady && cond.Status == corev1.ConditionTrue {
			return nil
		} else if cond.Type == corev1.NodeReady {
			return errors.New(cond.Message)
		}
	}
	return errors.New("it says nothing of itself yet")
}

// withLog adds the end of a program's log to an error.
func (c *Cluster) withLog(err error, name string) error {
	text, readErr := os.ReadFile(filepath.Join(c.Logs, name+".log"))
	if readErr != nil {
		return err
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	lines = lines[max(0, len(lines)-20):]
	return fmt.Errorf("%w\n--- %s.log:\n%s", err, name, strings.Join(lines, "\n"))
}

// WaitFor asks until the answer is nil, and fails with the last answer when that takes too long.
func WaitFor(ctx context.Context, within time.Duration, what string, ask func(context.Context) error) error {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	last := errors.New("not asked yet")
	for {
		if err := ask(ctx); err == nil {
			return nil
		} else if ctx.Err() == nil || last.Error() == "not asked yet" {
			last = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waited %.0f s for %s: %w", time.Since(began).Seconds(), what, errors.Join(last, lost(ctx)))
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// lost is why a context ended before its time, if it did.
func lost(ctx context.Context) error {
	if cause := context.Cause(ctx); !errors.Is(cause, context.DeadlineExceeded) {
		return cause
	}
	return nil
}
