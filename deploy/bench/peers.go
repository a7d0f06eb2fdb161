package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/outrigger-mesh/outrigger/deploy/bench/load"
)

// workers is how many threads or processes every peer may use, and GOMAXPROCS of
// those in Go: the benchmark runs on two processors.
const workers = 2

// world is what all peers are given.
type world struct {
	dir      string // for configuration and logs
	bin      string // our own programs
	tools    tools
	ports    map[string]netip.AddrPort // of the upstream, by protocol
	certs    string                    // folder
	upstream *process
	atOnce   int // connections that a proxy must be able to hold
}

// peer is a way from the load to the upstream.
type peer struct {
	name, title string
	// launch starts it for a scenario in a folder of its own. What it has started
	// is returned even where it fails.
	launch func(ctx context.Context, w *world, s scenario, dir string) (*running, error)
	how    string // what it does for its money, in a line
}

// running is a peer that has been started.
type running struct {
	address netip.AddrPort
	proxies []*process // that are measured
	others  []*process // that are not
	logs    []string   // access logs that it writes, a line a request
	admins  []string   // host:port of our sidecars' admin interfaces
}

func (r *running) stop() {
	for _, p := range append(r.proxies, r.others...) {
		p.stop()
	}
}

func (r *running) ended() error {
	var errs []error
	for _, p := range append(r.proxies, r.others...) {
		errs = append(errs, p.ended())
	}
	return errors.Join(errs...)
}

// errNot is wrapped by the errors of peers that were not tried.
var errNot = errors.New("not measured")

func not(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{errNot}, args...)...)
}

var peers = []peer{
	{"direct", "no proxy", launchDirect, "the load asks the upstream itself"},
	{"relay", "TCP relay in Go", launchRelay, "two goroutines a connection that copy bytes, for 64 KiB with splice(2), and read nothing of them"},
	{"nginx", "nginx", launchNginx, "proxy_pass to a keep-alive pool; access log in its combined format, buffered 64 KiB"},
	{"haproxy", "HAProxy", launchHAProxy, "mode http, http-reuse always; access log in its HTTP format to stdout, which is a file"},
	{"envoy", "Envoy", launchEnvoy, "router, circuit breaker thresholds, statistics, access log in its default format to a file, buffered 64 KiB"},
	{"reverseproxy", "httputil.ReverseProxy", launchReverseProxy, "Go's own, bare: no routes, no breaker, no metrics, no access log"},
	{"ours", "Outrigger's sidecar", launchOurs, "routes, an enforced breaker, metrics and the access log as JSON to stdout, which is a file"},
}

// freePort is a loopback address at which nothing listens.
func freePort() (netip.AddrPort, error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return netip.AddrPort{}, err
	}
	a, err := netip.ParseAddrPort(l.Addr().String())
	return a, errors.Join(err, l.Close())
}

// freePorts are several that differ.
func freePorts(n int) ([]netip.AddrPort, error) {
	out := make([]netip.AddrPort, n)
	held := make([]net.Listener, 0, n)
	defer func() {
		for _, l := range held {
			_ = l.Close() // nothing has connected
		}
	}()
	for i := range out {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		held = append(held, l)
		if out[i], err = netip.ParseAddrPort(l.Addr().String()); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func (r *running) run(dir, name string, env []string, program string, args ...string) error {
	p, err := start(dir, name, env, program, args...)
	if err == nil {
		r.proxies = append(r.proxies, p)
	}
	return err
}

func launchDirect(_ context.Context, w *world, s scenario, _ string) (*running, error) {
	return &running{address: w.ports[s.protocol]}, nil
}

var goEnv = []string{"GOMAXPROCS=" + strconv.Itoa(workers)}

func launchRelay(_ context.Context, w *world, s scenario, dir string) (*running, error) {
	r := &running{}
	to := w.ports[s.protocol]
	hops := []string{"relay"}
	if s.pair {
		hops = []string{"relay-server", "relay-client"}
	}
	for _, name := range hops {
		at, err := freePort()
		if err != nil {
			return r, err
		}
		if err := r.run(dir, name, goEnv, filepath.Join(w.bin, "peer"), "relay", "--listen", at.String(), "--to", to.String(), "--splice="+strconv.FormatBool(s.protocol == load.HTTP1Large)); err != nil {
			return r, err
		}
		r.address, to = at, at
	}
	return r, nil
}

func launchReverseProxy(_ context.Context, w *world, s scenario, dir string) (*running, error) {
	r := &running{}
	if !s.http() {
		return r, not("it carries HTTP only")
	}
	at, err := freePorts(2)
	if err != nil {
		return r, err
	}
	r.address = at[0]
	program := filepath.Join(w.bin, "peer")
	if s.pair {
		return r, errors.Join(
			r.run(dir, "reverseproxy-server", goEnv, program, "reverseproxy", "--listen", at[1].String(), "--to", w.ports[s.protocol].String(), "--tls", "server", "--certs", w.certs),
			r.run(dir, "reverseproxy-client", goEnv, program, "reverseproxy", "--listen", at[0].String(), "--to", at[1].String(), "--tls", "client", "--certs", w.certs))
	}
	return r, r.run(dir, "reverseproxy", goEnv, program, "reverseproxy", "--listen", at[0].String(), "--to", w.ports[s.protocol].String(), "--http2="+strconv.FormatBool(s.grpc()))
}

// expand fills {{name}} in a template and writes it.
func expand(path, template string, values map[string]string) error {
	pairs := make([]string, 0, 2*len(values))
	for k, v := range values {
		pairs = append(pairs, "{{"+k+"}}", v)
	}
	text := strings.NewReplacer(pairs...).Replace(template)
	if i := strings.Index(text, "{{"); i >= 0 {
		return fmt.Errorf("%s: %.30q is not filled in", filepath.Base(path), text[i:])
	}
	return os.WriteFile(path, []byte(text), 0o600)
}

const nginxBase = `daemon off;
{{user}}
worker_processes {{workers}};
worker_rlimit_nofile {{files}};
pid {{dir}}/{{name}}.pid;
error_log {{dir}}/{{name}}.error.log warn;
{{modules}}
events { worker_connections {{files}}; }
`

const nginxHTTP = nginxBase + `http {
  access_log {{log}} combined buffer=64k flush=1s;
  client_body_temp_path {{dir}}/{{name}}.body;
  proxy_temp_path {{dir}}/{{name}}.proxy;
  fastcgi_temp_path {{dir}}/{{name}}.fastcgi;
  uwsgi_temp_path {{dir}}/{{name}}.uwsgi;
  scgi_temp_path {{dir}}/{{name}}.scgi;
  upstream items {
    server {{to}};
    keepalive 256;
    keepalive_requests 1000000000;
    keepalive_timeout 1h;
  }
  server {
    listen {{at}}{{listen}} reuseport backlog=4096;
    keepalive_requests 1000000000;
    keepalive_timeout 1h;
    http2_max_concurrent_streams 1024;
{{server}}
    location {{path}} {
{{location}}
    }
  }
}
`

const nginxStream = nginxBase + `stream {
  log_format basic '$remote_addr [$time_local] $protocol $status $bytes_sent $bytes_received $session_time';
  access_log {{log}} basic buffer=64k flush=1s;
  server {
    listen {{at}} reuseport backlog=4096;
    proxy_pass {{to}};
    proxy_timeout 1h;
  }
}
`

const nginxProxy = `      proxy_pass {{scheme}}://items;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $host;
      proxy_buffer_size 16k;
      proxy_buffers 16 16k;
      proxy_busy_buffers_size 32k;
      proxy_max_temp_file_size 0;
`

// In TLS, everyone uses version 1.3 with one suite, and shows P-256.
const nginxTLSClient = `      proxy_ssl_certificate {{certs}}/client.pem;
      proxy_ssl_certificate_key {{certs}}/client.key;
      proxy_ssl_trusted_certificate {{certs}}/ca.pem;
      proxy_ssl_verify on;
      proxy_ssl_name server.bench;
      proxy_ssl_server_name on;
      proxy_ssl_protocols TLSv1.3;
      proxy_ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;
`

const nginxTLSServer = `    ssl_certificate {{certs}}/server.pem;
    ssl_certificate_key {{certs}}/server.key;
    ssl_client_certificate {{certs}}/ca.pem;
    ssl_verify_client on;
    ssl_protocols TLSv1.3;
    ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;
`

const nginxGRPC = `      grpc_pass grpc://items;
      grpc_read_timeout 1h;
      grpc_send_timeout 1h;
      client_max_body_size 0;
`

func launchNginx(_ context.Context, w *world, s scenario, dir string) (*running, error) {
	r := &running{}
	if w.tools.nginx == "" {
		return r, not("not installed: %s", w.tools.missing["nginx"])
	}
	at, err := freePorts(2)
	if err != nil {
		return r, err
	}
	r.address = at[0]
	hop := func(name, template string, at, to netip.AddrPort, more map[string]string) error {
		v := map[string]string{
			"workers": strconv.Itoa(workers), "files": strconv.Itoa(w.tools.files), "dir": dir, "name": name, "certs": w.certs, "modules": "", "user": "",
			"log": filepath.Join(dir, name+".access.log"), "at": at.String(), "to": to.String(), "listen": "", "server": "", "path": load.HTTP1Path, "scheme": "http",
		}
		for k, text := range more {
			v[k] = text
		}
		if os.Geteuid() == 0 {
			v["user"] = "user root;" // or its workers could not write here
		}
		file := filepath.Join(dir, name+".conf")
		// Twice: the parts have names in them.
		if err := expand(file, strings.NewReplacer("{{server}}", v["server"], "{{location}}", v["location"]).Replace(template), v); err != nil {
			return err
		}
		r.logs = append(r.logs, v["log"])
		return r.run(dir, name, w.tools.env, w.tools.nginx, "-e", filepath.Join(dir, name+".error.log"), "-p", dir, "-c", file)
	}
	up := w.ports[s.protocol]
	switch {
	case s.pair:
		return r, errors.Join(
			hop("nginx-server", nginxHTTP, at[1], up, map[string]string{"listen": " ssl", "server": nginxTLSServer, "location": nginxProxy}),
			hop("nginx-client", nginxHTTP, at[0], at[1], map[string]string{"location": nginxProxy + nginxTLSClient, "scheme": "https"}))
	case !s.http():
		if w.tools.stream == "" {
			return r, not("not installed: this nginx has no stream module")
		}
		return r, hop("nginx", nginxStream, at[0], up, map[string]string{"modules": "load_module " + w.tools.stream + ";"})
	case s.grpc():
		return r, hop("nginx", nginxHTTP, at[0], up, map[string]string{"listen": " http2", "location": nginxGRPC, "path": load.GRPCPath})
	default:
		return r, hop("nginx", nginxHTTP, at[0], up, map[string]string{"location": nginxProxy})
	}
}

const haproxyConfig = `global
  nbthread {{workers}}
  maxconn {{conns}}
  log stdout format raw local0 info
  ssl-default-bind-ciphersuites TLS_AES_128_GCM_SHA256
  ssl-default-server-ciphersuites TLS_AES_128_GCM_SHA256
defaults
  mode {{mode}}
  log global
  option {{log}}
  timeout connect 5s
  timeout client 1h
  timeout server 1h
frontend in
  bind {{at}}{{bind}} backlog 4096
{{rules}}
backend items
{{reuse}}
  server one {{to}}{{server}}
`

func launchHAProxy(_ context.Context, w *world, s scenario, dir string) (*running, error) {
	r := &running{}
	if w.tools.haproxy == "" {
		return r, not("not installed: %s", w.tools.missing["haproxy"])
	}
	at, err := freePorts(2)
	if err != nil {
		return r, err
	}
	r.address = at[0]
	hop := func(name string, at, to netip.AddrPort, bind, server string) error {
		v := map[string]string{
			"workers": strconv.Itoa(workers), "conns": strconv.Itoa(w.atOnce), "mode": "http", "log": "httplog", "reuse": "  http-reuse always",
			"at": at.String(), "to": to.String(), "bind": bind, "server": server,
			"rules": "  acl items path_beg " + load.HTTP1Path + " " + load.GRPCPath + " /bench\n  use_backend items if items",
		}
		if !s.http() {
			v["mode"], v["log"], v["reuse"], v["rules"] = "tcp", "tcplog", "", "  default_backend items"
		}
		file := filepath.Join(dir, name+".cfg")
		if err := expand(file, haproxyConfig, v); err != nil {
			return err
		}
		err := r.run(dir, name, w.tools.env, w.tools.haproxy, "-db", "-f", file)
		r.logs = append(r.logs, filepath.Join(dir, name+".out"))
		return err
	}
	up := w.ports[s.protocol]
	switch {
	case s.pair:
		tls := " ssl ca-file " + w.certs + "/ca.pem verify required ssl-min-ver TLSv1.3 crt " + w.certs
		return r, errors.Join(
			hop("haproxy-server", at[1], up, tls+"/server.both.pem", ""),
			hop("haproxy-client", at[0], at[1], "", tls+"/client.both.pem sni str(server.bench) verifyhost server.bench"))
	case s.grpc():
		return r, hop("haproxy", at[0], up, " proto h2", " proto h2")
	default:
		return r, hop("haproxy", at[0], up, "", "")
	}
}

const envoyConfig = `admin: {address: {socket_address: {address: 127.0.0.1, port_value: {{admin}}}}}
node: {id: bench, cluster: bench}
static_resources:
  listeners:
  - name: in
    address: {socket_address: {address: 127.0.0.1, port_value: {{port}}}}
    filter_chains:
    - filters:
{{filter}}
{{downstream}}
  clusters:
  - name: items
    type: STATIC
    connect_timeout: 5s
    circuit_breakers: {thresholds: [{max_connections: 20000, max_pending_requests: 20000, max_requests: 20000, max_retries: 3}]}
    load_assignment: {cluster_name: items, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: {{to}}}}}}]}]}
{{upstream}}
`

const envoyHTTP = `      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          codec_type: AUTO
          access_log: [{name: envoy.access_loggers.file, typed_config: {"@type": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: "{{log}}"}}]
          route_config:
            virtual_hosts:
            - name: items
              domains: ["{{host}}"]
              routes: [{match: {prefix: "{{path}}"}, route: {cluster: items, timeout: 0s}}]
          http_filters: [{name: envoy.filters.http.router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}]
`

const envoyTCP = `      - name: envoy.filters.network.tcp_proxy
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: in
          cluster: items
          access_log: [{name: envoy.access_loggers.file, typed_config: {"@type": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: "{{log}}"}}]
`

const envoyHTTP2Cluster = `    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
`

const envoyTLS = `common_tls_context: {tls_params: {tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}, tls_certificates: [{certificate_chain: {filename: "{{certs}}/{{side}}.pem"}, private_key: {filename: "{{certs}}/{{side}}.key"}}], validation_context: {trusted_ca: {filename: "{{certs}}/ca.pem"}}}`

const envoyTLSServer = `      transport_socket: {name: envoy.transport_sockets.tls, typed_config: {"@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext, require_client_certificate: true, ` + envoyTLS + "}}\n"

const envoyTLSClient = `    transport_socket: {name: envoy.transport_sockets.tls, typed_config: {"@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext, sni: server.bench, ` + envoyTLS + "}}\n"

func launchEnvoy(_ context.Context, w *world, s scenario, dir string) (*running, error) {
	r := &running{}
	if w.tools.envoy == "" {
		return r, not("not installed: %s", w.tools.missing["envoy"])
	}
	at, err := freePorts(4)
	if err != nil {
		return r, err
	}
	r.address = at[0]
	hop := func(name string, at, admin, to netip.AddrPort, down, up, side string) error {
		log := filepath.Join(dir, name+".access.log")
		filter, path := envoyHTTP, load.HTTP1Path
		if !s.http() {
			filter = envoyTCP
		}
		if s.grpc() {
			path, up = load.GRPCPath, envoyHTTP2Cluster
		}
		file := filepath.Join(dir, name+".yaml")
		err := expand(file, strings.NewReplacer("{{filter}}", filter, "{{downstream}}", down, "{{upstream}}", up).Replace(envoyConfig), map[string]string{
			"admin": strconv.Itoa(int(admin.Port())), "port": strconv.Itoa(int(at.Port())), "to": strconv.Itoa(int(to.Port())), "log": log,
			"host": load.Host, "path": path, "certs": w.certs, "side": side,
		})
		if err != nil {
			return err
		}
		r.logs = append(r.logs, log)
		return r.run(dir, name, nil, w.tools.envoy, "-c", file, "--disable-hot-restart", "--concurrency", strconv.Itoa(workers), "--log-level", "error")
	}
	up := w.ports[s.protocol]
	if s.pair {
		return r, errors.Join(hop("envoy-server", at[1], at[2], up, envoyTLSServer, "", "server"), hop("envoy-client", at[0], at[3], at[1], "", envoyTLSClient, "client"))
	}
	return r, hop("envoy", at[0], at[2], up, "", "", "")
}

// tools are the programs of others.
type tools struct {
	nginx, stream, haproxy, envoy string
	env                           []string          // for nginx and haproxy
	missing                       map[string]string // why, by peer
	versions                      [][2]string       // name and version
	files                         int               // descriptors that a process may open
}

// findTools finds them, or fetches them; what cannot be had is in missing.
func findTools(ctx context.Context, root string) tools {
	t := tools{missing: map[string]string{}}
	text, err := output(ctx, nil, filepath.Join(root, "deploy/bench/tools.sh"))
	if err != nil {
		t.missing["nginx"], t.missing["haproxy"] = err.Error(), err.Error()
	}
	for line := range strings.Lines(text) {
		switch f := strings.Fields(line); {
		case len(f) == 3 && f[0] == "nginx":
			t.nginx = f[1]
			if f[2] != "-" {
				t.stream = f[2]
			}
		case len(f) == 2 && f[0] == "haproxy":
			t.haproxy = f[1]
		case len(f) == 2 && f[0] == "libraries" && f[1] != "-":
			t.env = append(t.env, "LD_LIBRARY_PATH="+f[1])
		case len(f) > 2 && f[0] == "missing":
			t.missing[f[1]] = strings.Join(f[2:], " ")
		default:
		}
	}
	text, err = output(ctx, nil, filepath.Join(root, "deploy/apptest/envoy.sh"))
	if t.envoy = strings.TrimSpace(text); err != nil {
		t.envoy, t.missing["envoy"] = "", err.Error()
	}
	version := func(name, program string, args ...string) {
		if program == "" {
			return
		}
		cmd := exec.CommandContext(ctx, program, args...)
		cmd.Env = append(os.Environ(), t.env...)
		b, err := cmd.CombinedOutput()
		if err != nil {
			b = []byte("unknown")
		}
		line, _, _ := strings.Cut(strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(string(b)), program)), "\n")
		t.versions = append(t.versions, [2]string{name, line})
	}
	version("nginx", t.nginx, "-v")
	version("HAProxy", t.haproxy, "-v")
	version("Envoy", t.envoy, "--version")
	return t
}
