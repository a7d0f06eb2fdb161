package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
)

// sidecarNames are the two whose samples are taken, in this order.
var sidecarNames = []string{"caller", "peer"}

// kinds of application, and the appProtocol of each one's Service.
var kinds = []struct{ name, appProtocol, inbound string }{
	{"web", "http", "http"}, {"web2", "http2", "http"}, {"rpc", "grpc", "http"}, {"raw", "tcp", "tcp"},
}

// world is the programs, and the applications in this process.
type world struct {
	mesh     string
	programs []*program // control plane, caller's sidecar, peer's sidecar
	admins   []string   // of the sidecars
	calls    map[string]string
	inbounds map[string][2]string // two ports of the peer's sidecar for each kind, so that endpoints can come and go
	apps     []*app
}

func newWorld(ctx context.Context, bin, dir string) (w *world, err error) {
	w = &world{mesh: filepath.Join(dir, "mesh"), calls: map[string]string{}, inbounds: map[string][2]string{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	var failed error
	address := func() string {
		a, err := freeAddress()
		failed = errors.Join(failed, err)
		return a
	}
	xds, admin := address(), address()
	var callerArgs, peerArgs []string
	for i, k := range kinds {
		w.calls[k.name] = address()
		w.inbounds[k.name] = [2]string{address(), address()}
		a := &app{address: address(), serve: servers[i]}
		w.apps = append(w.apps, a)
		failed = errors.Join(failed, a.start())
		callerArgs = append(callerArgs, "--upstream", k.name+".soak:80="+w.calls[k.name])
		for _, in := range w.inbounds[k.name] {
			peerArgs = append(peerArgs, "--inbound", k.inbound+":"+in+"="+a.address)
		}
	}
	if failed = errors.Join(failed, os.MkdirAll(w.mesh, 0o700), w.write(0)); failed != nil {
		return w, failed
	}
	run := func(name, binary string, args ...string) error {
		p, err := launch(dir, name, filepath.Join(bin, binary), args...)
		if err == nil {
			w.programs = append(w.programs, p)
		}
		return err
	}
	if err := run("control-plane", "control-plane", "--config", w.mesh, "--xds-address", xds, "--admin-address", admin); err != nil {
		return w, err
	}
	for i, more := range [][]string{callerArgs, peerArgs} {
		w.admins = append(w.admins, address())
		if err := run(sidecarNames[i], "sidecar", append([]string{
			"--namespace", "soak", "--workload", sidecarNames[i], "--instance", sidecarNames[i] + "-0", "--service-account", sidecarNames[i],
			"--control-plane", xds, "--admin-address", w.admins[i], "--metrics-address", "", "--health-address", "",
		}, more...)...); err != nil {
			return w, err
		}
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if err := w.dead(); err != nil {
			return w, err
		}
		if w.read(0, "/ready") != "" && w.read(1, "/ready") != "" {
			return w, failed
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return w, errors.New("the sidecars are not ready after 20s")
		}
	}
}

// write puts the objects in the folder: which of the two endpoints of each kind
// there are changes with each round.
func (w *world) write(round int) error {
	var b strings.Builder
	for i, k := range kinds {
		fmt.Fprintf(&b, "---\napiVersion: v1\nkind: Service\nmetadata: {name: %[1]s, namespace: soak}\nspec:\n  selector: {app: %[1]s}\n  ports: [{name: port, port: 80, targetPort: port, appProtocol: %[2]s}]\n", k.name, k.appProtocol)
		fmt.Fprintf(&b, "---\napiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {name: %[1]s, namespace: soak, labels: {app: %[1]s}}\nspec:\n  serviceAccount: peer\n  endpoints:\n", k.name)
		for n, address := range w.inbounds[k.name] {
			if (round+i)%3 == n+1 {
				continue // of three rounds, one is without it
			}
			host, port, err := net.SplitHostPort(address)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, "  - {name: %s-%d, address: %s, ports: {port: %s}}\n", k.name, n, host, port)
		}
	}
	next := filepath.Join(w.mesh, ".next")
	return errors.Join(os.WriteFile(next, []byte(b.String()), 0o600), os.Rename(next, filepath.Join(w.mesh, "soak.yaml")))
}

// churn changes endpoints and restarts applications until ctx ends.
func (w *world) churn(ctx context.Context) {
	for round := 1; ; round++ {
		select {
		case <-ctx.Done():
			return
		case <-time.After(4 * time.Second):
		}
		if err := w.write(round); err != nil {
			fmt.Fprintln(os.Stderr, "soak: write endpoints:", err)
		}
		if round%2 == 0 {
			a := w.apps[round/2%len(w.apps)]
			a.stop()
			time.Sleep(100 * time.Millisecond)
			if err := a.start(); err != nil {
				fmt.Fprintln(os.Stderr, "soak: restart an application:", err)
			}
		}
	}
}

func (w *world) sample() []sample {
	var out []sample
	for i := range sidecarNames {
		out = append(out, take(w.programs[1+i].cmd.Process.Pid, w.read(i, "/metrics")))
	}
	return out
}

// read is what a sidecar's admin port says; empty where it does not answer 200.
func (w *world) read(i int, path string) string {
	c := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := c.Get("http://" + w.admins[i] + path)
	if err != nil {
		return ""
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		return ""
	}
	return string(b)
}

func (w *world) dead() error {
	var err error
	for _, p := range w.programs {
		err = errors.Join(err, p.dead())
	}
	return err
}

func (w *world) close() error {
	var err error
	for i := len(w.programs) - 1; i >= 0; i-- {
		err = errors.Join(err, w.programs[i].stop())
	}
	for _, a := range w.apps {
		a.stop()
	}
	return err
}

// app is an application that can be restarted.
type app struct {
	address string
	serve   func(l net.Listener) (stop func())
	end     func()
}

func (a *app) start() error {
	l, err := net.Listen("tcp", a.address)
	if err == nil {
		a.end = a.serve(l)
	}
	return err
}

func (a *app) stop() {
	if a.end != nil {
		a.end()
		a.end = nil
	}
}

// servers are the applications, as kinds lists them.
var servers = []func(net.Listener) func(){serveWeb, serveWeb, serveRPC, serveRaw}

func serveWeb(l net.Listener) func() {
	p := &http.Protocols{}
	p.SetHTTP1(true)
	p.SetUnencryptedHTTP2(true)
	up := websocket.Upgrader{}
	mux := http.NewServeMux()
	var sockets sync.WaitGroup
	done := make(chan struct{})
	mux.HandleFunc("/socket", func(rw http.ResponseWriter, r *http.Request) {
		c, err := up.Upgrade(rw, r, nil)
		if err != nil {
			return
		}
		sockets.Go(func() {
			<-done // hijacked connections are ours to end
			_ = c.Close()
		})
		for {
			kind, b, err := c.ReadMessage()
			if err != nil || c.WriteMessage(kind, b) != nil {
				_ = c.Close()
				return
			}
		}
	})
	mux.HandleFunc("/", func(rw http.ResponseWriter, r *http.Request) {
		if rand.IntN(20) == 0 {
			time.Sleep(time.Duration(rand.IntN(20)) * time.Millisecond)
		}
		_ = http.NewResponseController(rw).EnableFullDuplex() // HTTP/2 always is
		_, _ = io.Copy(rw, r.Body)
	})
	s := &http.Server{Handler: mux, Protocols: p, ReadHeaderTimeout: 10 * time.Second}
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.Serve(l) })
	return func() {
		_ = s.Close()
		close(done)
		sockets.Wait()
		wg.Wait()
	}
}

func serveRPC(l net.Listener) func() {
	s := grpc.NewServer()
	healthv1.RegisterHealthServer(s, health.NewServer())
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.Serve(l) })
	return func() { s.Stop(); wg.Wait() }
}

func serveRaw(l net.Listener) func() {
	var wg sync.WaitGroup
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[c] = true
			mu.Unlock()
			wg.Go(func() {
				_, _ = io.Copy(c, c)
				_ = c.Close()
				mu.Lock()
				delete(open, c)
				mu.Unlock()
			})
		}
	})
	return func() {
		_ = l.Close()
		mu.Lock()
		for c := range open {
			_ = c.Close()
		}
		mu.Unlock()
		wg.Wait()
	}
}
