// Command shop is one of the four applications of the demo, chosen by --role:
//
//	storefront --GET /checkout--> catalog GET /price, cart GET /items, payments POST /pay
//
// It knows nothing of the mesh: it calls addresses that it is given, passes the
// W3C trace context on, and logs JSON lines. When payments fails, storefront
// takes the order all the same and promises to charge later.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "shop:", err)
		os.Exit(1)
	}
}

type shop struct {
	log                     *slog.Logger
	client                  *http.Client
	catalog, cart, payments string
	failing                 atomic.Bool
}

func run(ctx context.Context, args []string, stdout io.Writer) error {
	fs := flag.NewFlagSet("shop", flag.ContinueOnError)
	role := fs.String("role", "", "storefront, catalog, cart or payments")
	listen := fs.String("listen", "127.0.0.1:8080", "address to serve on")
	s := &shop{client: &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 64}}}
	fs.StringVar(&s.catalog, "catalog", "", "host:port of catalog")
	fs.StringVar(&s.cart, "cart", "", "host:port of cart")
	fs.StringVar(&s.payments, "payments", "", "host:port of payments")
	if err := fs.Parse(args); err != nil {
		return err
	}
	s.log = slog.New(slog.NewJSONHandler(stdout, &slog.HandlerOptions{ReplaceAttr: record.ECS}))
	mux := http.NewServeMux()
	switch *role {
	case "storefront":
		mux.HandleFunc("GET /checkout", s.checkout)
	case "catalog":
		mux.HandleFunc("GET /price", s.answer(`{"price":1200}`, "price looked up", 2*time.Millisecond))
	case "cart":
		mux.HandleFunc("GET /items", s.answer(`{"items":3}`, "cart read", time.Millisecond))
	case "payments":
		mux.HandleFunc("POST /pay", s.pay)
		mux.HandleFunc("POST /demo/fail", func(http.ResponseWriter, *http.Request) { s.failing.Store(true) })
		mux.HandleFunc("POST /demo/heal", func(http.ResponseWriter, *http.Request) { s.failing.Store(false) })
	default:
		return fmt.Errorf("--role %q is not storefront, catalog, cart or payments", *role)
	}
	server := &http.Server{Addr: *listen, Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	end := context.AfterFunc(ctx, func() {
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Second)
		defer cancel()
		_ = server.Shutdown(drain) // what is left then is cut by the end of the program
	})
	defer end()
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// with is the log for one request: its lines carry the trace.
func (s *shop) with(r *http.Request) *slog.Logger {
	if p := strings.Split(r.Header.Get("traceparent"), "-"); len(p) >= 4 {
		return s.log.With("trace.id", p[1])
	}
	return s.log
}

func (s *shop) answer(body, line string, work time.Duration) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(work)
		s.with(r).Info(line)
		_, _ = io.WriteString(w, body) // a caller that hangs up has given its reason to nobody
	}
}

func (s *shop) pay(w http.ResponseWriter, r *http.Request) {
	order, _ := io.ReadAll(io.LimitReader(r.Body, 4096))
	var o struct {
		ID string `json:"id"`
	}
	_ = json.Unmarshal(order, &o) // an order without an id is charged under an empty one
	time.Sleep(3*time.Millisecond + rand.N(2*time.Millisecond))
	if s.failing.Load() {
		s.with(r).Error("payment declined: card processor unreachable", "order.id", o.ID)
		http.Error(w, "card processor unreachable", http.StatusInternalServerError)
		return
	}
	s.with(r).Info("payment accepted", "order.id", o.ID)
	_, _ = io.WriteString(w, `{"charged":true}`)
}

func (s *shop) checkout(w http.ResponseWriter, r *http.Request) {
	log := s.with(r)
	for what, address := range map[string]string{"price": s.catalog, "items": s.cart} {
		if _, err := s.call(r, http.MethodGet, "http://"+address+"/"+what, nil); err != nil {
			log.Error("checkout failed", "error.message", err.Error())
			http.Error(w, "checkout failed: "+err.Error(), http.StatusBadGateway)
			return
		}
	}
	id := fmt.Sprintf("order-%08x", rand.Uint32())
	paid := "now"
	breaker, err := s.call(r, http.MethodPost, "http://"+s.payments+"/pay", []byte(`{"id":"`+id+`"}`))
	if err != nil {
		paid = "later"
		log.Warn("payments is away: order taken, charge deferred", "order.id", id, "error.message", err.Error(), "breaker", breaker)
	} else {
		log.Info("order taken", "order.id", id)
	}
	w.Header().Set("X-Paid", paid)
	w.Header().Set("Content-Type", "application/json")
	_, _ = fmt.Fprintf(w, `{"order":%q,"paid":%q}`+"\n", id, paid)
}

// call passes the trace context on, as every application in a mesh must. It
// returns what the sidecar said of its breaker.
func (s *shop) call(r *http.Request, method, url string, body []byte) (string, error) {
	req, err := http.NewRequestWithContext(r.Context(), method, url, bytes.NewReader(body))
	if err != nil {
		return "", err
	}
	for _, h := range []string{"traceparent", "tracestate", "x-request-id"} {
		if v := r.Header.Get(h); v != "" {
			req.Header.Set(h, v)
		}
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }() // the answer has been read
	text, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return resp.Header.Get("X-Outrigger-Breaker"), fmt.Errorf("%s: %s", resp.Status, bytes.TrimSpace(text))
	}
	return "", nil
}
