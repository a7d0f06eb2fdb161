package proxy_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/listener/redirecttest"
)

// The tests of capture run in a network namespace of their own, with real rules
// and three processes: the test, which is the sidecar; the application, of another
// user, beside it; and a peer, in a namespace behind a veth, which has the
// addresses of everybody else.
const (
	// lostEnv has the rules made for another user than the sidecar's.
	lostEnv = "OUTRIGGER_TEST_LOST"
	roleEnv = "OUTRIGGER_TEST_ROLE" // pod: the test in its namespace; app and peer: the others

	podIPv4, podIPv6 = "10.1.0.2", "fd01::2"
	// strayIPv4 is on the pod's interface and none of the pod's addresses.
	strayIPv4 = "10.1.0.3"
	appUser   = 1000
)

func TestMain(m *testing.M) {
	switch role := os.Getenv(roleEnv); role {
	case "app", "peer":
		if err := hands(role); err != nil {
			fmt.Fprintln(os.Stderr, role+":", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// TestCapture runs the tests of capture in a namespace.
func TestCapture(t *testing.T) {
	inNamespace(t, "^TestPod", "--- PASS: TestPodServiceCall")
}

// Rules that redirect the sidecar's own connections would have it call itself for
// ever.
func TestCaptureByTheWrongUser(t *testing.T) {
	t.Setenv(lostEnv, "1")
	inNamespace(t, "^TestLost", "--- PASS: TestLostSidecarSaysSoAndDoesNotCallItselfForEver")
}

// inNamespace runs other tests of this program in a network namespace.
func inNamespace(t *testing.T, tests, passed string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIPPED: a network namespace needs root: nothing of capture was tested")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("SKIPPED: there is no program ip: nothing of capture was tested")
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run="+tests, "-test.v", "-test.timeout=300s")
	cmd.Env = append(os.Environ(), roleEnv+"=pod")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	out, err := cmd.CombinedOutput()
	if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EINVAL) {
		t.Skipf("SKIPPED: this system makes no network namespace: nothing of capture was tested: %v", err)
	}
	if strings.Contains(string(out), noRules) {
		t.Skip("SKIPPED: " + noRules + ": nothing of capture was tested")
	}
	if err != nil || !strings.Contains(string(out), passed) {
		t.Fatalf("%v\n%s", err, out)
	}
	if testing.Verbose() {
		t.Logf("%s", out)
	}
}

const noRules = "the kernel takes no rules of nftables"

// order is what a process is told to do, on its standard input; report is what
// became of it.
type order struct {
	Do   string // sh, get, burst, say, hold or look
	To   string // command, URL or address
	Send string
	ID   string // of a connection that lasts
}

type report struct {
	Got    string
	Status int
	Err    string
	Took   time.Duration
}

// seen is what a server tells of a request.
type seen struct{ Role, At, From, Host, XFCC string }

// hands does what it is told, and serves: HTTP at 80 and 8080, an echo at 9000, and
// at 25 one that speaks first.
func hands(role string) error {
	if role == "app" {
		if err := syscall.Setuid(appUser); err != nil {
			return err
		}
	}
	serve := func(port int, f func(net.Conn)) error {
		l, err := net.Listen("tcp", ":"+strconv.Itoa(port))
		if err != nil {
			return err
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() { defer func() { _ = c.Close() }(); f(c) }()
			}
		}()
		return nil
	}
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		at, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
		_ = json.NewEncoder(w).Encode(seen{role, at.String(), r.RemoteAddr, r.Host, r.Header.Get("X-Forwarded-Client-Cert")})
	})
	ports := []int{8080}
	if role == "peer" {
		ports = append(ports, 80)
	}
	for _, port := range ports {
		l, err := net.Listen("tcp", ":"+strconv.Itoa(port))
		if err != nil {
			return err
		}
		go func() { _ = (&http.Server{Handler: handler, ReadHeaderTimeout: time.Minute}).Serve(l) }()
	}
	if err := serve(9000, func(c net.Conn) { _, _ = io.Copy(c, c) }); err != nil {
		return err
	}
	if role == "peer" {
		if err := serve(25, func(c net.Conn) { _, _ = io.WriteString(c, "220 hello\n"); _, _ = io.Copy(c, c) }); err != nil {
			return err
		}
	}
	clients, conns := map[string]*http.Client{}, map[string]net.Conn{}
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for o := (order{}); in.Decode(&o) == nil; o = (order{}) { // until the test has ended
		began := time.Now()
		r := obey(&o, clients, conns)
		r.Took = time.Since(began)
		if err := out.Encode(r); err != nil {
			return err
		}
	}
	return nil
}

func obey(o *order, clients map[string]*http.Client, conns map[string]net.Conn) (r report) {
	fail := func(err error) report { return report{Err: err.Error()} }
	const patience = 20 * time.Second
	switch o.Do {
	case "sh":
		if b, err := exec.Command("sh", "-ec", o.To).CombinedOutput(); err != nil {
			return fail(fmt.Errorf("%w: %s", err, b))
		}
	case "get":
		c := clients[o.ID]
		if c == nil {
			c = &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: o.ID == ""}}
			clients[o.ID] = c
		}
		resp, err := c.Get(o.To)
		if err != nil {
			return fail(err)
		}
		defer func() { _ = resp.Body.Close() }()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			return fail(err)
		}
		r.Got, r.Status = string(b), resp.StatusCode
	case "burst": // as many requests at once as Send says; Status is how many were answered
		n, err := strconv.Atoi(o.Send)
		if err != nil {
			return fail(err)
		}
		c := &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}
		results := make(chan error, n)
		for range n {
			go func() {
				resp, err := c.Get(o.To)
				if err == nil {
					err = resp.Body.Close()
				}
				results <- err
			}()
		}
		for range n {
			if err := <-results; err != nil {
				r.Err = err.Error()
			} else {
				r.Status++
			}
		}
	case "say", "hold": // connect, say something, and read a line; hold keeps the connection
		c, err := net.DialTimeout("tcp", o.To, patience)
		if err != nil {
			return fail(err)
		}
		if o.Do == "hold" {
			conns[o.ID] = c
		} else {
			defer func() { _ = c.Close() }()
		}
		_ = c.SetDeadline(time.Now().Add(patience))
		if _, err := io.WriteString(c, o.Send); err != nil {
			return fail(err)
		}
		line, err := bufio.NewReader(c).ReadString('\n')
		if r.Got = line; err != nil {
			r.Err = err.Error()
		}
	case "look": // wait for the end of a held connection
		_ = conns[o.ID].SetDeadline(time.Now().Add(patience))
		b, err := io.ReadAll(conns[o.ID])
		if r.Got = string(b); err != nil {
			r.Err = err.Error()
		} else {
			r.Err = "EOF"
		}
		_ = conns[o.ID].Close()
	default:
		r.Err = "what is " + o.Do + "?"
	}
	return r
}

// other is another process.
type other struct {
	in  *json.Encoder
	out *json.Decoder
}

func (o *other) do(t testing.TB, v order) report {
	t.Helper()
	if err := o.in.Encode(v); err != nil {
		t.Fatal(err)
	}
	var r report
	if err := o.out.Decode(&r); err != nil {
		t.Fatal(err)
	}
	return r
}

// get makes a request, and returns what the server saw of it.
func (o *other) get(t testing.TB, url, id string) (seen, report) {
	t.Helper()
	r := o.do(t, order{Do: "get", To: url, ID: id})
	var s seen
	if r.Err == "" && r.Status == 200 {
		if err := json.Unmarshal([]byte(r.Got), &s); err != nil {
			t.Fatalf("%s: %q", url, r.Got)
		}
	}
	return s, r
}

func startOther(role string, flags uintptr) (*other, int, error) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleEnv+"="+role)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags, Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, 0, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, 0, err
	}
	if err := cmd.Start(); err != nil {
		return nil, 0, err
	}
	// They end with this process, which closes their standard input.
	return &other{in: json.NewEncoder(in), out: json.NewDecoder(out)}, cmd.Process.Pid, nil
}

// pod is the namespace with its rules, made once.
type pod struct{ app, peer *other }

var thePod = sync.OnceValues(makePod)

func inPod(t *testing.T) *pod {
	t.Helper()
	if os.Getenv(roleEnv) != "pod" {
		t.Skip("runs in the namespace that TestCapture makes")
	}
	p, err := thePod()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func makePod() (*pod, error) {
	peer, pid, err := startOther("peer", syscall.CLONE_NEWNET)
	if err != nil {
		return nil, err
	}
	run := func(script string) error {
		if b, err := exec.Command("sh", "-ec", script).CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, b)
		}
		return nil
	}
	if err := run(`ip link set lo up
ip addr add ::6/128 dev lo
ip link add pod0 type veth peer name peer0
ip link set peer0 netns ` + strconv.Itoa(pid) + `
ip addr add ` + podIPv4 + `/24 dev pod0
ip addr add ` + strayIPv4 + `/24 dev pod0
ip addr add ` + podIPv6 + `/64 dev pod0 nodad
ip link set pod0 up
ip route add default via 10.1.0.1
ip -6 route add default via fd01::1 dev pod0`); err != nil {
		return nil, err
	}
	if err := peer.in.Encode(order{Do: "sh", To: `ip link set lo up
ip addr add 10.1.0.1/24 dev peer0
ip addr add fd01::1/64 dev peer0 nodad
for a in 10.2.0.1/32 10.2.0.2/32 203.0.113.5/32; do ip addr add $a dev lo; done
for a in fd02::1/128 fd02::2/128 2001:db8::5/128; do ip addr add $a dev lo; done
ip link set peer0 up`}); err != nil {
		return nil, err
	}
	var r report
	if err := peer.out.Decode(&r); err != nil || r.Err != "" {
		return nil, fmt.Errorf("peer: %w %s", err, r.Err)
	}
	uid := os.Getuid()
	if os.Getenv(lostEnv) != "" {
		uid = 1337
	}
	if err := redirecttest.Set(uid); err != nil {
		fmt.Println(noRules+":", err)
		return nil, err
	}
	app, _, err := startOther("app", 0)
	return &pod{app, peer}, err
}
