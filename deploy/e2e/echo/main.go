// Command echo stands in for the image echo-advanced of the Gateway API's
// conformance tests, which is not in a module: a server that says what it was
// asked, and, under the name client, a client that says what it was answered.
//
// What is written is what sigs.k8s.io/gateway-api/conformance/utils/echo reads:
// lines of Key=Value, responses apart by an empty line.
package main

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	pb "sigs.k8s.io/gateway-api/conformance/echo-basic/grpcechoserver"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	play := serve
	if filepath.Base(os.Args[0]) == "client" {
		play = call
	}
	if err := play(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "echo:", err)
		os.Exit(1)
	}
}

// ports is a flag that may be repeated.
type ports []int

func (p *ports) String() string { return fmt.Sprint([]int(*p)) }

func (p *ports) Set(s string) error {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 {
		return errors.New("not a port")
	}
	*p = append(*p, int(n))
	return nil
}

func serve(ctx context.Context, args []string) error {
	var plain, encrypted, streams, grpcs ports
	fs := flag.NewFlagSet("server", flag.ContinueOnError)
	fs.Var(&plain, "port", "port for HTTP/1.1 and HTTP/2")
	fs.Var(&encrypted, "tls", "which of the ports speak TLS")
	fs.Var(&streams, "tcp", "port that sends back what it gets")
	fs.Var(&grpcs, "grpc", "port for gRPC")
	fs.String("crt", "", "ignored: the certificate is made here")
	fs.String("key", "", "ignored: the certificate is made here")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if len(plain)+len(streams)+len(grpcs) == 0 {
		plain = ports{8080} // pods that only call are given no ports
	}
	name, err := os.Hostname()
	if err != nil {
		return err
	}
	cert, err := selfSigned(name)
	if err != nil {
		return err
	}
	errs := make(chan error, len(plain)+len(streams)+len(grpcs))
	listen := func(port int) (net.Listener, error) {
		return (&net.ListenConfig{}).Listen(ctx, "tcp", ":"+strconv.Itoa(port))
	}
	for _, port := range plain {
		l, err := listen(port)
		if err != nil {
			return err
		}
		if slices.Contains(encrypted, port) {
			l = tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}})
		}
		protocols := &http.Protocols{}
		protocols.SetHTTP1(true)
		protocols.SetHTTP2(true)
		protocols.SetUnencryptedHTTP2(true)
		server := &http.Server{Handler: echo(name, port), ReadHeaderTimeout: 10 * time.Second, Protocols: protocols}
		context.AfterFunc(ctx, func() { _ = server.Shutdown(context.WithoutCancel(ctx)) })
		go func() { errs <- server.Serve(l) }()
	}
	for _, port := range streams {
		l, err := listen(port)
		if err != nil {
			return err
		}
		context.AfterFunc(ctx, func() { _ = l.Close() })
		go func() { errs <- stream(l, name) }()
	}
	for _, port := range grpcs {
		l, err := listen(port)
		if err != nil {
			return err
		}
		server := grpc.NewServer()
		pb.RegisterGrpcEchoServer(server, &grpcEcho{name: name})
		context.AfterFunc(ctx, server.GracefulStop)
		go func() { errs <- server.Serve(l) }()
	}
	for range len(plain) + len(streams) + len(grpcs) {
		if err := <-errs; ctx.Err() == nil {
			return err
		}
	}
	return nil
}

// selfSigned makes a certificate that nobody is asked to trust.
func selfSigned(name string) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	t := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(1, 0, 0)}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

func echo(name string, port int) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ip, _, _ := net.SplitHostPort(r.RemoteAddr)
		w.Header().Set("Content-Type", "text/plain")
		fmt.Fprintf(w, "ServicePort=%d\nHost=%s\nURL=%s\nMethod=%s\nProto=%s\nIP=%s\nHostname=%s\n", port, r.Host, r.URL.RequestURI(), r.Method, r.Proto, ip, name)
		for k, values := range r.Header {
			for _, v := range values {
				fmt.Fprintf(w, "RequestHeader=%s:%s\n", k, v)
			}
		}
	})
}

func stream(l net.Listener, name string) error {
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go func() { // ends with the client, or with the program
			defer func() { _ = conn.Close() }()
			in := bufio.NewScanner(conn)
			for in.Scan() {
				fmt.Fprintf(conn, "Hostname=%s\n%s\n", name, in.Text())
			}
		}()
	}
}

type grpcEcho struct {
	pb.UnimplementedGrpcEchoServer
	name string
}

func (g *grpcEcho) Echo(ctx context.Context, _ *pb.EchoRequest) (*pb.EchoResponse, error) {
	a := &pb.Assertions{FullyQualifiedMethod: pb.GrpcEcho_Echo_FullMethodName, Context: &pb.Context{Pod: g.name}}
	md, _ := metadata.FromIncomingContext(ctx)
	for k, values := range md {
		for _, v := range values {
			a.Headers = append(a.Headers, &pb.Header{Key: k, Value: v})
		}
	}
	return &pb.EchoResponse{Assertions: a}, nil
}

type client struct {
	method string
	header http.Header
	count  int
}

// call makes the calls one after another and writes each answer. A call without an
// answer is an error of the program, which the tests take for "not yet".
func call(ctx context.Context, args []string) error {
	c := client{header: http.Header{}}
	fs := flag.NewFlagSet("client", flag.ContinueOnError)
	fs.StringVar(&c.method, "method", http.MethodGet, "method")
	fs.IntVar(&c.count, "count", 1, "how often")
	fs.Func("H", "name:value; may be repeated", func(s string) error {
		name, value, ok := strings.Cut(s, ":")
		if !ok {
			return errors.New("write name:value")
		}
		c.header.Add(name, strings.TrimSpace(value))
		return nil
	})
	// The address stands before the flags.
	if len(args) == 0 {
		return errors.New("say what to call")
	}
	if err := fs.Parse(args[1:]); err != nil {
		return err
	}
	target, err := url.Parse(args[0])
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second+time.Duration(c.count)*20*time.Millisecond)
	defer cancel()
	out := bufio.NewWriter(os.Stdout)
	if target.Scheme == "grpc" {
		err = c.grpc(ctx, out, target)
	} else {
		err = c.http(ctx, out, target)
	}
	if err != nil {
		return err
	}
	return out.Flush()
}

func (c client) http(ctx context.Context, out io.Writer, target *url.URL) error {
	h := &http.Client{
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			// A connection for each call, so that each is balanced.
			DisableKeepAlives: true,
			// The server's certificate is made by itself; these tests are not about it.
			TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
		},
	}
	for i := range c.count {
		req, err := http.NewRequestWithContext(ctx, c.method, target.String(), nil)
		if err != nil {
			return err
		}
		req.Header = c.header.Clone()
		if host := req.Header.Get("Host"); host != "" {
			req.Host = host
		}
		resp, err := h.Do(req)
		if err != nil {
			return err
		}
		body, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "[%d] Url=%s\n[%d] StatusCode=%d\n", i, target, i, resp.StatusCode)
		for k, values := range resp.Header {
			for _, v := range values {
				fmt.Fprintf(out, "[%d] ResponseHeader=%s:%s\n", i, k, v)
			}
		}
		write(out, i, string(body))
	}
	return nil
}

func write(out io.Writer, i int, body string) {
	for line := range strings.Lines(body) {
		if line = strings.TrimSpace(line); line != "" {
			fmt.Fprintf(out, "[%d body] %s\n", i, line)
		}
	}
	fmt.Fprintln(out)
}

func (c client) grpc(ctx context.Context, out io.Writer, target *url.URL) error {
	for k, values := range c.header {
		for _, v := range values {
			ctx = metadata.AppendToOutgoingContext(ctx, strings.ToLower(k), v)
		}
	}
	conn, err := grpc.NewClient("passthrough:///"+target.Host, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	for i := range c.count {
		resp, err := pb.NewGrpcEchoClient(conn).Echo(ctx, &pb.EchoRequest{})
		// The original reports the HTTP status of a call that was answered.
		code := http.StatusOK
		if s := status.Code(err); s != codes.OK {
			if s == codes.Unavailable || s == codes.DeadlineExceeded {
				return err
			}
			code = int(s)
		}
		fmt.Fprintf(out, "[%d] StatusCode=%d\n", i, code)
		body := "Hostname=" + resp.GetAssertions().GetContext().GetPod() + "\n"
		for _, h := range resp.GetAssertions().GetHeaders() {
			body += "RequestHeader=" + h.GetKey() + ":" + h.GetValue() + "\n"
		}
		write(out, i, body)
	}
	return nil
}
