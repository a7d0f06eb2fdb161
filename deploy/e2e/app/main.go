// Command app is what runs in the pods of the stories: a server, a generator of
// load, a client for single calls and a job.
//
//	app serve                 answer on --http and --tcp until SIGTERM
//	app load --target URL     call for ever; app stats prints what became of it
//	app get URL               call, and print what came back as JSON lines
//	app tcp HOST:PORT         what the other side says first, and its echo
//	app job --url URL         call some times, then end with --exit
//	app lines                 print numbered lines
//
// It knows nothing of the mesh and has no dependency.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// statsAddress is where load says what became of its calls.
const statsAddress = "127.0.0.1:9999"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "app:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New("say serve, load, stats, get, tcp, job or lines")
	}
	verbs := map[string]func(context.Context, []string) error{"serve": serve, "load": load, "stats": stats, "get": get, "tcp": tcp, "job": job, "lines": lines}
	verb, ok := verbs[args[0]]
	if !ok {
		return fmt.Errorf("%q is not serve, load, stats, get, tcp, job or lines", args[0])
	}
	return verb(ctx, args[1:])
}

// serve ends as most programs do: at SIGTERM it takes no new connections and
// finishes what runs, without waiting for the world to notice.
func serve(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("serve", flag.ContinueOnError)
	listen := fs.String("http", ":8080", "address for HTTP")
	bytesAt := fs.String("tcp", "", "address for a protocol in which the server speaks first. Empty: none")
	delay := fs.Duration("delay", 0, "how long an answer takes")
	if err := fs.Parse(args); err != nil {
		return err
	}
	name, err := os.Hostname()
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /ready", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ready\n") })
	mux.HandleFunc("/status/{code}", func(w http.ResponseWriter, r *http.Request) {
		code, err := strconv.Atoi(r.PathValue("code"))
		if err != nil || code < 200 || code > 599 {
			code = http.StatusBadRequest
		}
		w.WriteHeader(code)
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		time.Sleep(*delay)
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]any{ // a caller that hung up wants no answer
			"pod": name, "method": r.Method, "path": r.URL.Path, "host": r.Host, "proto": r.Proto, "remote": r.RemoteAddr, "headers": r.Header, "body": string(body),
		})
	})
	server := &http.Server{Addr: *listen, Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	var running sync.WaitGroup
	if *bytesAt != "" {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", *bytesAt)
		if err != nil {
			return err
		}
		context.AfterFunc(ctx, func() { _ = l.Close() })
		running.Go(func() { greet(l, name) })
	}
	done := make(chan error, 1)
	context.AfterFunc(ctx, func() {
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
		defer cancel()
		done <- server.Shutdown(drain)
	})
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	running.Wait()
	return <-done
}

// greet says hello before the client says anything, then sends back each line.
func greet(l net.Listener, name string) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() { // ends with the client, or with the program
			defer func() { _ = conn.Close() }()
			fmt.Fprintf(conn, "hello from %s\n", name)
			in := bufio.NewScanner(conn)
			for in.Scan() {
				fmt.Fprintf(conn, "%s\n", in.Text())
			}
		}()
	}
}

// Stats is what became of the calls of load since it began.
type Stats struct {
	Requests, Failed int
	Codes            map[string]int
	// Slowest answer, in milliseconds.
	SlowestMS int64
	// Errors are the last 20, with their times.
	Errors []string
}

type generator struct {
	target string
	mu     sync.Mutex
	stats  Stats
}

// load calls with half its workers on connections that are kept and with the
// other half on one for each call.
func load(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("load", flag.ContinueOnError)
	g := &generator{stats: Stats{Codes: map[string]int{}}}
	fs.StringVar(&g.target, "target", "", "URL to call")
	workers := fs.Int("workers", 4, "how many call at a time")
	rate := fs.Int("rate", 40, "calls a second, of all workers together")
	timeout := fs.Duration("timeout", 10*time.Second, "how long a call may take")
	if err := fs.Parse(args); err != nil {
		return err
	}
	server := &http.Server{Addr: statsAddress, ReadHeaderTimeout: time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		g.mu.Lock()
		defer g.mu.Unlock()
		_ = json.NewEncoder(w).Encode(g.stats) // the asker is beside us
	})}
	context.AfterFunc(ctx, func() { _ = server.Close() })
	var running sync.WaitGroup
	for i := range *workers {
		client := &http.Client{Timeout: *timeout, Transport: &http.Transport{DisableKeepAlives: i%2 == 1}}
		running.Go(func() {
			for ctx.Err() == nil {
				next := time.Now().Add(time.Duration(*workers) * time.Second / time.Duration(*rate))
				g.call(ctx, client)
				select {
				case <-ctx.Done():
				case <-time.After(time.Until(next)):
				}
			}
		})
	}
	err := server.ListenAndServe()
	running.Wait()
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

func (g *generator) call(ctx context.Context, client *http.Client) {
	began := time.Now()
	code, err := func() (int, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, g.target, nil)
		if err != nil {
			return 0, err
		}
		resp, err := client.Do(req)
		if err != nil {
			return 0, err
		}
		defer func() { _ = resp.Body.Close() }()
		text, err := io.ReadAll(resp.Body)
		if err == nil && resp.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s: %s %v", resp.Status, strings.TrimSpace(string(text)), resp.Header)
		}
		return resp.StatusCode, err
	}()
	if ctx.Err() != nil {
		return // we are ending: what is cut off is nobody's failure
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	s := &g.stats
	s.Requests++
	s.SlowestMS = max(s.SlowestMS, time.Since(began).Milliseconds())
	s.Codes[strconv.Itoa(code)]++
	if err != nil {
		s.Failed++
		s.Errors = append(s.Errors, fmt.Sprintf("%s after %d ms: %v", time.Now().UTC().Format("15:04:05.000"), time.Since(began).Milliseconds(), err))
		s.Errors = s.Errors[max(0, len(s.Errors)-20):]
		fmt.Println(s.Errors[len(s.Errors)-1])
	}
}

func stats(ctx context.Context, _ []string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+statsAddress, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	_, err = io.Copy(os.Stdout, resp.Body)
	return err
}

// Answer is a line that get prints.
type Answer struct {
	Status  int
	Header  http.Header
	Body    string
	Error   string
	Seconds float64
}

func get(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("get", flag.ContinueOnError)
	method := fs.String("method", http.MethodGet, "method")
	body := fs.String("body", "", "body")
	count := fs.Int("count", 1, "how often")
	timeout := fs.Duration("timeout", 10*time.Second, "how long a call may take")
	fresh := fs.Bool("fresh", false, "a connection for each call")
	header := http.Header{}
	fs.Func("header", "name:value; may be repeated", func(s string) error {
		name, value, ok := strings.Cut(s, ":")
		if !ok {
			return errors.New("write name:value")
		}
		header.Add(name, strings.TrimSpace(value))
		return nil
	})
	if err := fs.Parse(args); err != nil {
		return err
	}
	client := &http.Client{Timeout: *timeout, Transport: &http.Transport{DisableKeepAlives: *fresh}, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	out := json.NewEncoder(os.Stdout)
	for range *count {
		if err := out.Encode(ask(ctx, client, *method, fs.Arg(0), *body, header)); err != nil {
			return err
		}
	}
	return nil
}

func ask(ctx context.Context, client *http.Client, method, url, body string, header http.Header) (a Answer) {
	began := time.Now()
	defer func() { a.Seconds = time.Since(began).Seconds() }()
	req, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		return Answer{Error: err.Error()}
	}
	req.Header = header
	if host := header.Get("Host"); host != "" {
		req.Host = host
	}
	resp, err := client.Do(req)
	if err != nil {
		return Answer{Error: err.Error()}
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	a = Answer{Status: resp.StatusCode, Header: resp.Header, Body: string(text)}
	if err != nil {
		a.Error = err.Error()
	}
	return a
}

func tcp(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return errors.New("say where to: tcp HOST:PORT")
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", args[0])
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	in := bufio.NewReader(conn)
	greeting, err := in.ReadString('\n')
	if err != nil {
		return fmt.Errorf("no greeting: %w", err)
	}
	if _, err := io.WriteString(conn, "ping\n"); err != nil {
		return err
	}
	echo, err := in.ReadString('\n')
	if err != nil {
		return fmt.Errorf("no echo: %w", err)
	}
	fmt.Print(greeting, echo)
	return nil
}

func job(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("job", flag.ContinueOnError)
	url := fs.String("url", "", "what to call. Empty: nothing")
	calls := fs.Int("calls", 3, "how often")
	sleep := fs.Duration("sleep", 0, "how long to work before the end")
	exit := fs.Int("exit", 0, "with what to end")
	if err := fs.Parse(args); err != nil {
		return err
	}
	for range *calls {
		if *url == "" {
			break
		}
		a := ask(ctx, &http.Client{Timeout: 10 * time.Second}, http.MethodGet, *url, "", http.Header{})
		if a.Status != http.StatusOK {
			return fmt.Errorf("%s: %d %s %s", *url, a.Status, a.Error, a.Body)
		}
		fmt.Println(strings.TrimSpace(a.Body))
	}
	select {
	case <-ctx.Done():
	case <-time.After(*sleep):
	}
	if *exit != 0 {
		os.Exit(*exit)
	}
	return nil
}

// lines prints "line 1", "line 2" and so on.
func lines(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("lines", flag.ContinueOnError)
	count := fs.Int("count", 0, "how many. 0: for ever")
	every := fs.Duration("every", 50*time.Millisecond, "how long from one to the next")
	stay := fs.Bool("stay", false, "wait for SIGTERM after the last")
	if err := fs.Parse(args); err != nil {
		return err
	}
	tick := time.NewTicker(*every)
	defer tick.Stop()
	for i := 1; *count == 0 || i <= *count; i++ {
		fmt.Println("line", i)
		if i == *count {
			break
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
	if *stay {
		<-ctx.Done()
	}
	return nil
}
