package cluster

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// envCgroup names the root of the run's cgroups, below that of the caller.
const envCgroup = "OUTRIGGER_E2E_CGROUP"

// enterCgroups moves this process into cgroups of its own, makes them the root of
// what it and its children see, and goes on as roleRoot.
func enterCgroups() error {
	groups, err := mountedCgroups()
	if err != nil {
		return err
	}
	for _, g := range groups {
		dir := filepath.Join(g.mount, g.path, os.Getenv(envCgroup))
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return fmt.Errorf("a cgroup: %w", err)
		}
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			// Empty in a new cgroup, which then takes no process.
			if text, err := os.ReadFile(filepath.Join(filepath.Dir(dir), file)); err == nil && g.kind == "cgroup" {
				if err := os.WriteFile(filepath.Join(dir, file), text, 0o600); err != nil {
					return fmt.Errorf("a cgroup: %w", err)
				}
			}
		}
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0o600); err != nil {
			return fmt.Errorf("enter the cgroup %s: %w", dir, err)
		}
	}
	// The namespace is the thread's; exec from this thread makes it the process's.
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("a cgroup namespace: %w", err)
	}
	return fmt.Errorf("start again: %w", syscall.Exec("/proc/self/exe", append([]string{os.Args[0], roleRoot}, os.Args[2:]...), os.Environ()))
}

// beInit makes the machine that the cluster runs on, runs the caller's program in
// it, and adopts orphans until that ends. When it returns the kernel ends all.
func beInit() (int, error) {
	// Said again: the wish to die with the parent was that of the thread that exec ended.
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(syscall.SIGKILL), 0, 0, 0); err != nil {
		return 0, fmt.Errorf("die with the parent: %w", err)
	}
	groups, err := mountedCgroups()
	if err != nil {
		return 0, err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return 0, fmt.Errorf("private mounts: %w", err)
	}
	if err := mount("proc", "/proc", "proc", ""); err != nil {
		return 0, err
	}
	if err := mountSystem(groups); err != nil {
		return 0, err
	}
	if err := os.MkdirAll(stateFolder(), 0o755); err != nil {
		return 0, fmt.Errorf("the state: %w", err)
	}
	if err := unix.Mount("outrigger-e2e", stateFolder(), "tmpfs", 0, "mode=0755,size=8g"); err != nil {
		return 0, fmt.Errorf("the state: %w", err)
	}
	if err := shieldSysctls(); err != nil {
		return 0, err
	}
	if err := unix.Sethostname([]byte("cluster")); err != nil {
		return 0, fmt.Errorf("the name of the host: %w", err)
	}
	if err := makeSwitch(); err != nil {
		return 0, err
	}

	program, err := os.StartProcess("/proc/self/exe", append([]string{os.Args[0]}, os.Args[2:]...), &os.ProcAttr{
		Env: os.Environ(), Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
	})
	if err != nil {
		return 0, fmt.Errorf("start inside: %w", err)
	}
	defer leaveInterrupts()()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return 0, fmt.Errorf("wait: %w", err)
		case pid != program.Pid:
		case status.Signaled():
			return 128 + int(status.Signal()), nil
		case status.Exited():
			return status.ExitStatus(), nil
		}
	}
}

func stateFolder() string { return filepath.Join(os.Getenv(envFolder), "state") }

func mount(source, target, kind, options string) error {
	if err := unix.Mount(source, target, kind, unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		return fmt.Errorf("mount %s: %w", target, err)
	}
	return nil
}

// mountSystem mounts what belongs to the network and cgroup namespaces of this
// process. /proc is mounted once: a second one would hide what shields sysctls.
func mountSystem(groups []cgroup) error {
	if err := mount("sysfs", "/sys", "sysfs", ""); err != nil {
		return err
	}
	if err := mount("cgroups", cgroups, "tmpfs", "mode=0755"); err != nil {
		return err
	}
	for _, g := range groups {
		if err := os.MkdirAll(g.mount, 0o755); err != nil {
			return fmt.Errorf("a mount point: %w", err)
		}
		if err := mount("cgroup", g.mount, g.kind, g.options); err != nil {
			return err
		}
	}
	return mount("run", "/run", "tmpfs", "mode=0755")
}

// shieldSysctls gives the kubelet files to write its settings to that look like
// the kernel's: these belong to the whole machine, and no namespace holds them.
func shieldSysctls() error {
	dir := filepath.Join(stateFolder(), "sysctl")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("sysctls: %w", err)
	}
	for _, path := range []string{
		"/proc/sys/vm/overcommit_memory", "/proc/sys/vm/panic_on_oom", "/proc/sys/kernel/panic", "/proc/sys/kernel/panic_on_oops",
		"/proc/sys/kernel/keys/root_maxkeys", "/proc/sys/kernel/keys/root_maxbytes",
	} {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // this kernel has none
		}
		stand := filepath.Join(dir, filepath.Base(path))
		if err := os.WriteFile(stand, text, 0o644); err != nil {
			return fmt.Errorf("sysctls: %w", err)
		}
		if err := unix.Mount(stand, path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("shield %s: %w", path, err)
		}
	}
	return nil
}

// The network between the nodes. Pods have addresses that are routed, and nothing
// leads out of here, so nothing needs to be masqueraded.
const (
	switchName    = "switch0"
	switchAddress = "172.30.0.1/24"
	// APIAddress is where the API server listens.
	APIAddress   = "172.30.0.1:6443"
	apiIP        = "172.30.0.1"
	serviceCIDR  = "10.96.0.0/16"
	kubernetesIP = "10.96.0.1"
	dnsIP        = "10.96.0.10"
	podCIDR      = "10.244.0.0/16"
)

func makeSwitch() error {
	if err := up("lo"); err != nil {
		return err
	}
	bridge := &netlink.Bridge{LinkAttrs: netlink.NewLinkAttrs()}
	bridge.Name = switchName
	if err := netlink.LinkAdd(bridge); err != nil {
		return fmt.Errorf("the bridge between the nodes: %w", err)
	}
	if err := addAddress(switchName, switchAddress); err != nil {
		return err
	}
	if err := up(switchName); err != nil {
		return err
	}
	return forward()
}

// forward lets this network namespace route.
func forward() error {
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o600); err != nil {
		return fmt.Errorf("forwarding: %w", err)
	}
	return nil
}

func up(name string) error {
	link, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkSetUp(link)
	}
	if err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}

func addAddress(name, address string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("link %s: %w", name, err)
	}
	addr, err := netlink.ParseAddr(address)
	if err == nil {
		err = netlink.AddrAdd(link, addr)
	}
	if err != nil {
		return fmt.Errorf("address %s of %s: %w", address, name, err)
	}
	return nil
}

func addRoute(to, via string) error {
	_, subnet, err := parseCIDR(to)
	if err != nil {
		return err
	}
	gateway, err := parseIP(via)
	if err != nil {
		return err
	}
	if err := netlink.RouteReplace(&netlink.Route{Dst: subnet, Gw: gateway}); err != nil {
		return fmt.Errorf("route to %s by %s: %w", to, via, err)
	}
	return nil
}

// connect puts a cable between the switch and the namespace of the process pid,
// whose end is called eth0 there.
func connect(name string, pid int) error {
	veth := &netlink.Veth{LinkAttrs: netlink.NewLinkAttrs(), PeerName: "eth0", PeerNamespace: netlink.NsPid(pid)}
	veth.Name = name
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("a cable to %s: %w", name, err)
	}
	bridge, err := netlink.LinkByName(switchName)
	if err != nil {
		return fmt.Errorf("link %s: %w", switchName, err)
	}
	if err := netlink.LinkSetMaster(veth, bridge); err != nil {
		return fmt.Errorf("a cable to %s: %w", name, err)
	}
	return up(name)
}
