// Command peer is what the benchmark needs on both sides of a proxy and has no
// program of its own for: the upstream server, a raw TCP relay (the least that
// any proxy does) and httputil.ReverseProxy.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout)
	stop()
	if err != nil && !errors.Is(err, context.Canceled) {
		fmt.Fprintln(os.Stderr, "peer:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout io.Writer) error {
	if len(args) == 0 {
		return errors.New("say what to be: upstream, relay or reverseproxy")
	}
	fs := flag.NewFlagSet("peer "+args[0], flag.ContinueOnError)
	var o options
	fs.StringVar(&o.listen, "listen", "127.0.0.1:0", "address to listen at")
	fs.StringVar(&o.to, "to", "", "address to carry to")
	fs.BoolVar(&o.http2, "http2", false, "reverseproxy: speak HTTP/2 in clear on both sides")
	fs.BoolVar(&o.splice, "splice", false, "relay: let the kernel move the bytes")
	fs.StringVar(&o.tls, "tls", "", "reverseproxy: use mutual TLS as client or server")
	fs.StringVar(&o.certs, "certs", "", "folder with ca.pem, <side>.pem and <side>.key")
	if err := fs.Parse(args[1:]); err != nil {
		return err
	}
	switch args[0] {
	case "upstream":
		return upstream(ctx, stdout)
	case "relay":
		return relay(ctx, o)
	case "reverseproxy":
		return reverseProxy(ctx, o)
	default:
		return fmt.Errorf("%q is not upstream, relay or reverseproxy", args[0])
	}
}

type options struct {
	listen, to string
	http2      bool
	splice     bool
	tls, certs string
}
