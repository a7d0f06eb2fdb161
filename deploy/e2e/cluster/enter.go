// Package cluster runs a real Kubernetes of two nodes on this machine: etcd, the
// API server, controller manager and scheduler, and on each node containerd,
// kubelet and kube-proxy, with CoreDNS in it.
//
// All of it lives in namespaces of its own (mounts, network, processes, cgroups),
// so that nothing touches the network or the files of the machine, and all of it
// ends with one process. It knows how that is built and how to ask it things; it
// knows nothing of the product. deploy/e2e is its caller.
//
// One program plays several roles, told apart by Dispatch:
//
//	outside    make the roots of the cgroups, start init, clear up afterwards
//	init       the first process inside: mounts, the network, adopting orphans
//	inside     the caller's program; Start runs the cluster from here
//	node       a node: a network and mounts of its own, containerd, kubelet, kube-proxy
package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	roleInit = "__init"
	roleRoot = "__root" // init again, after it has entered its cgroup namespace
	roleNode = "__node"

	// envFolder is set inside: the folder of the run.
	envFolder = "OUTRIGGER_E2E_FOLDER"

	cgroups      = "/sys/fs/cgroup"
	cgroupPrefix = "outrigger-e2e-"
)

// Dispatch plays the role of init or of a node when the program was started for
// it; else it returns false. A main calls it before it does anything else.
func Dispatch() (code int, handled bool) {
	if len(os.Args) < 2 {
		return 0, false
	}
	var err error
	switch os.Args[1] {
	case roleInit:
		err = enterCgroups()
	case roleRoot:
		code, err = beInit()
	case roleNode:
		err = beNode(os.Args[2])
	default:
		return 0, false
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", strings.TrimPrefix(os.Args[1], "__")+":", err)
		return 1, true
	}
	return code, true
}

// Inside says whether this process is in the namespaces that Enter makes.
func Inside() bool { return os.Getenv(envFolder) != "" }

// Enter runs this program again, with the same arguments, inside namespaces of its
// own, and returns its exit code. Folder is where logs and results go; one run
// at a time may use it. It needs root.
func Enter(ctx context.Context, folder string) (int, error) {
	if os.Geteuid() != 0 {
		return 0, errors.New("a cluster needs root: it makes namespaces, mounts and cgroups")
	}
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return 0, fmt.Errorf("the folder of the run: %w", err)
	}
	unlock, err := lock(folder)
	if err != nil {
		return 0, err
	}
	defer unlock()
	removeStale()
	self, err := os.Executable()
	if err != nil {
		return 0, fmt.Errorf("where is this program: %w", err)
	}
	name := cgroupPrefix + strconv.Itoa(os.Getpid())
	defer removeCgroups(name)

	// The child is to die with this process: Linux tells it when the thread that
	// made it ends, so the thread must live as long.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd := exec.Command(self, append([]string{roleInit}, os.Args[1:]...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), envFolder+"="+folder, envCgroup+"="+name)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWNET | syscall.CLONE_NEWPID | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC,
		Pdeathsig:  syscall.SIGKILL,
	}
	defer leaveInterrupts()()
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("enter namespaces: %w", err)
	}
	defer context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })()
	// For people: nsenter --target wants to know it.
	if err := os.WriteFile(filepath.Join(folder, "pid"), []byte(strconv.Itoa(cmd.Process.Pid)+"\n"), 0o644); err != nil {
		fmt.Fprintln(os.Stderr, "cluster: the process to enter:", err)
	}
	err = cmd.Wait()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return exit.ExitCode(), nil
	}
	return 0, err
}

// leaveInterrupts to the program inside: Ctrl-C reaches it by the terminal, and it
// ends by itself. (Ignoring the signal would be passed on to it.)
func leaveInterrupts() (stop func()) {
	ch := make(chan os.Signal, 1)
	signal.Notify(ch, syscall.SIGINT)
	return func() { signal.Stop(ch) }
}

func lock(folder string) (func(), error) {
	f, err := os.OpenFile(filepath.Join(folder, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("the lock of the run: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("%s is used by another run: wait for it, or give another --folder", folder)
	}
	return func() { _ = f.Close() }, nil
}

// cgroup is one mounted hierarchy, and where this process is in it.
type cgroup struct{ mount, kind, options, path string }

// mountedCgroups are the hierarchies under /sys/fs/cgroup.
func mountedCgroups() ([]cgroup, error) {
	mine := map[string]string{}
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, fmt.Errorf("the cgroups of this process: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.SplitN(strings.TrimSpace(line), ":", 3); len(f) == 3 {
			mine[f[1]] = f[2]
		}
	}
	text, err = os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("the mounts of this process: %w", err)
	}
	var out []cgroup
	seen := map[string]bool{} // mount points hold mounts that others hide
	for line := range strings.Lines(string(text)) {
		before, after, _ := strings.Cut(strings.TrimSpace(line), " - ")
		f, g := strings.Fields(before), strings.Fields(after)
		if len(f) < 5 || len(g) < 3 || !strings.HasPrefix(f[4], cgroups) || seen[f[4]] {
			continue
		}
		seen[f[4]] = true
		switch g[0] {
		case "cgroup2":
			out = append(out, cgroup{mount: f[4], kind: "cgroup2", path: mine[""]})
		case "cgroup":
			var options []string
			for o := range strings.SplitSeq(g[2], ",") {
				if o != "rw" && o != "ro" {
					options = append(options, o)
				}
			}
			// The key in /proc/self/cgroup is the same list without other options.
			for key, path := range mine {
				if key != "" && strings.Join(options, ",") == key {
					out = append(out, cgroup{mount: f[4], kind: "cgroup", options: key, path: path})
				}
			}
		}
	}
	if len(out) == 0 {
		return nil, errors.New("no cgroups are mounted under " + cgroups)
	}
	return out, nil
}

// removeCgroups removes the cgroups of a run whose processes have ended. It stays
// below the cgroup of this process, where it was made.
func removeCgroups(name string) {
	groups, err := mountedCgroups()
	if err != nil {
		return
	}
	for _, g := range groups {
		root := filepath.Join(g.mount, g.path, name)
		// The kernel needs a moment to let go of processes that were killed.
		for range 50 {
			var folders []string
			_ = filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					folders = append(folders, path)
				}
				return nil
			})
			for i := len(folders) - 1; i >= 0; i-- {
				_ = os.Remove(folders[i])
			}
			if _, err := os.Stat(root); err != nil {
				break
			}
			time.Sleep(100 * time.Millisecond)
		}
	}
}

// removeStale clears up after runs that were killed: those whose process is gone.
func removeStale() {
	groups, err := mountedCgroups()
	if err != nil {
		return
	}
	for _, g := range groups {
		found, _ := filepath.Glob(filepath.Join(g.mount, g.path, cgroupPrefix+"*"))
		for _, f := range found {
			name := filepath.Base(f)
			if _, err := os.Stat("/proc/" + strings.TrimPrefix(name, cgroupPrefix)); err != nil {
				removeCgroups(name)
			}
		}
	}
}
