package cluster

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// nodeConfig is what a node is told at birth.
type nodeConfig struct {
	Name, IP, PodCIDR, Zone string
	Bin, Nft                string // folders of the programs
	Logs, PKI, State        string
	Images                  string // a tar of all images
	// Peers are the other nodes: their pods are reached by their addresses.
	Peers map[string]string // pod subnet -> address
}

// beNode is the life of a node, in a network and mounts of its own: it waits for
// its cable, starts the runtime, imports the images, starts kubelet and
// kube-proxy, and keeps them until it is killed.
func beNode(file string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("the configuration: %w", err)
	}
	var c nodeConfig
	if err := json.Unmarshal(text, &c); err != nil {
		return fmt.Errorf("the configuration %s: %w", file, err)
	}
	// Whoever started this writes a line when the cable is there.
	if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		return fmt.Errorf("waiting for the cable: %w", err)
	}
	if err := c.mounts(); err != nil {
		return err
	}
	if err := c.network(); err != nil {
		return err
	}
	if err := c.files(); err != nil {
		return err
	}
	ctx := context.Background() // a node is not shut down, it is killed
	path := strings.Join([]string{c.Bin, c.Nft, os.Getenv("PATH")}, ":")
	g := &group{logs: c.Logs, env: append(os.Environ(), "PATH="+path, "LD_LIBRARY_PATH="+c.libraries())}
	if err := g.keep(ctx, c.Name+"-containerd", filepath.Join(c.Bin, "containerd"), "--config", "/etc/containerd/config.toml"); err != nil {
		return err
	}
	if err := c.importImages(ctx, g.env); err != nil {
		return err
	}
	kubelet := []string{
		filepath.Join(c.Bin, "kubelet"), "--config=/etc/kubernetes/kubelet.yaml", "--kubeconfig=" + filepath.Join(c.PKI, c.Name+".kubeconfig"),
		"--cert-dir=/var/lib/kubelet/pki", "--hostname-override=" + c.Name, "--node-ip=" + c.IP, "--v=2",
		"--node-labels=topology.kubernetes.io/zone=" + c.Zone + ",topology.kubernetes.io/region=here",
	}
	if err := g.keep(ctx, c.Name+"-kubelet", kubelet...); err != nil {
		return err
	}
	if err := g.keep(ctx, c.Name+"-kube-proxy", filepath.Join(c.Bin, "kube-proxy"), "--config=/etc/kubernetes/proxy.yaml", "--v=1"); err != nil {
		return err
	}
	g.running.Wait()
	return nil
}

// manifests is the folder of a node's static pods.
func manifests(state string) string { return filepath.Join(state, "manifests") }

// libraries of the unpacked nft, which lie beside it.
func (c nodeConfig) libraries() string {
	usr := filepath.Dir(c.Nft)
	found, _ := filepath.Glob(filepath.Join(usr, "lib", "*-linux-gnu"))
	return strings.Join(found, ":")
}

// mounts gives the node the places that its programs write to, by their usual
// names: an upper layer in memory over the machine's /etc, /var, /opt and
// /usr/libexec, so that nothing of this machine changes.
func (c nodeConfig) mounts() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("private mounts: %w", err)
	}
	groups, err := mountedCgroups()
	if err != nil {
		return err
	}
	if err := mountSystem(groups); err != nil {
		return err
	}
	for _, dir := range []string{"/etc", "/var", "/opt", "/usr/libexec"} {
		if _, err := os.Stat(dir); err != nil {
			continue
		}
		name := strings.ReplaceAll(strings.Trim(dir, "/"), "/", "-")
		upper, work := filepath.Join(c.State, "upper", name), filepath.Join(c.State, "work", name)
		for _, d := range []string{upper, work} {
			if err := os.MkdirAll(d, 0o755); err != nil {
				return fmt.Errorf("an upper layer: %w", err)
			}
		}
		if err := unix.Mount("overlay", dir, "overlay", 0, "lowerdir="+dir+",upperdir="+upper+",workdir="+work); err != nil {
			return fmt.Errorf("an upper layer over %s: %w", dir, err)
		}
	}
	// An overlay cannot lie on an overlay's upper layer; the snapshots of containers are overlays.
	// All of /var/log is one mount, as on most nodes: a second name of a log can be made in it.
	for _, dir := range []string{"/var/lib/containerd", "/var/lib/kubelet", "/var/log"} {
		source := filepath.Join(c.State, "own", dir)
		for _, d := range []string{source, dir} {
			if err := os.MkdirAll(d, 0o755); err != nil {
				return fmt.Errorf("a folder of the node: %w", err)
			}
		}
		if err := unix.Mount(source, dir, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount %s: %w", dir, err)
		}
	}
	// The kubelet's mounts must be seen by containers, and theirs by it.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("shared mounts: %w", err)
	}
	if err := unix.Sethostname([]byte(c.Name)); err != nil {
		return fmt.Errorf("the name of the host: %w", err)
	}
	return nil
}

func (c nodeConfig) network() error {
	for _, link := range []string{"lo", "eth0"} {
		if err := up(link); err != nil {
			return err
		}
	}
	if err := addAddress("eth0", c.IP+"/24"); err != nil {
		return err
	}
	for subnet, via := range c.Peers {
		if err := addRoute(subnet, via); err != nil {
			return err
		}
	}
	if err := addRoute("0.0.0.0/0", apiIP); err != nil {
		return err
	}
	return forward()
}

func (c nodeConfig) files() error {
	files := map[string]string{
		"/etc/containerd/config.toml": `version = 4
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.nri.v1.nri"]
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "overlayfs"
  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = "` + PauseImage + `"
[plugins.'io.containerd.cri.v1.runtime']
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ["/opt/cni/bin"]
    conf_dir = "/etc/cni/net.d"
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
      BinaryName = "` + filepath.Join(c.Bin, "runc") + `"
      SystemdCgroup = false
`,
		"/etc/cni/net.d/10-bridge.conflist": `{"cniVersion":"1.0.0","name":"bridge","plugins":[
 {"type":"bridge","bridge":"cni0","isGateway":true,"ipMasq":false,"hairpinMode":true,
  "ipam":{"type":"host-local","dataDir":"/run/cni-ipam","ranges":[[{"subnet":"` + c.PodCIDR + `"}]],"routes":[{"dst":"0.0.0.0/0"}]}}]}
`,
		"/etc/kubernetes/resolv.conf": "",
		"/etc/kubernetes/kubelet.yaml": `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupRoot: /` + c.Name + `
cgroupsPerQOS: true
enforceNodeAllocatable: ["pods"]
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
failSwapOn: false
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: ` + c.PKI + `/ca.crt}}
authorization: {mode: Webhook}
tlsCertFile: ` + c.PKI + `/` + c.Name + `.crt
tlsPrivateKeyFile: ` + c.PKI + `/` + c.Name + `.key
clusterDomain: cluster.local
clusterDNS: ["` + dnsIP + `"]
resolvConf: /etc/kubernetes/resolv.conf
oomScoreAdj: 0
maxOpenFiles: 65536
# There is no registry to pull back from.
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
evictionHard: {memory.available: "100Mi", nodefs.available: "1%", imagefs.available: "1%", nodefs.inodesFree: "1%"}
syncFrequency: 10s
staticPodPath: ` + manifests(c.State) + `
fileCheckFrequency: 2s
nodeStatusUpdateFrequency: 5s
registryPullQPS: 0
kubeAPIQPS: 200
kubeAPIBurst: 400
`,
		"/etc/kubernetes/proxy.yaml": `apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
clusterCIDR: ` + podCIDR + `
hostnameOverride: ` + c.Name + `
clientConnection: {kubeconfig: ` + c.PKI + `/kube-proxy.kubeconfig}
oomScoreAdj: 0
conntrack: {maxPerCore: 0}
metricsBindAddress: 127.0.0.1:10249
healthzBindAddress: 127.0.0.1:10256
`,
	}
	for path, text := range files {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return fmt.Errorf("a file of the node: %w", err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return fmt.Errorf("a file of the node: %w", err)
		}
	}
	if err := os.MkdirAll(manifests(c.State), 0o755); err != nil {
		return fmt.Errorf("the folder of static pods: %w", err)
	}
	if err := os.MkdirAll("/opt/cni/bin", 0o755); err != nil {
		return fmt.Errorf("the CNI plugins: %w", err)
	}
	for _, plugin := range []string{"bridge", "host-local", "loopback"} {
		path := filepath.Join("/opt/cni/bin", plugin)
		_ = os.Remove(path) // the machine's own, hidden by the upper layer
		if err := os.Symlink(filepath.Join(c.Bin, plugin), path); err != nil {
			return fmt.Errorf("the CNI plugins: %w", err)
		}
	}
	return c.cgroupRoot()
}

// cgroupRoot makes the root of the node's pods in every hierarchy: the kubelet
// wants to find it.
func (c nodeConfig) cgroupRoot() error {
	groups, err := mountedCgroups()
	if err != nil {
		return err
	}
	for _, g := range groups {
		dir := filepath.Join(g.mount, c.Name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("the cgroup of the node: %w", err)
		}
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			if text, err := os.ReadFile(filepath.Join(g.mount, file)); err == nil && g.kind == "cgroup" {
				if err := os.WriteFile(filepath.Join(dir, file), text, 0o600); err != nil {
					return fmt.Errorf("the cgroup of the node: %w", err)
				}
			}
		}
	}
	return nil
}

// importImages waits for containerd and gives it the images.
func (c nodeConfig) importImages(ctx context.Context, env []string) error {
	var out []byte
	var err error
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		cmd := exec.CommandContext(ctx, filepath.Join(c.Bin, "ctr"), "--namespace=k8s.io", "images", "import", "--local", c.Images)
		cmd.Env = env
		if out, err = cmd.CombinedOutput(); err == nil {
			return nil
		}
	}
	return fmt.Errorf("import images: %w\n%s", err, out)
}
