// Command demo plays the main story of Outrigger on one machine: a small shop
// whose calls pass through sidecars that a control plane configures, a service
// that begins to fail and heals, a breaker that opens, says why and closes, and
// one place where all of it can be searched.
//
// It starts the real programs on loopback ports and takes the part that
// Kubernetes has on a cluster: it starts the containers, writes their output
// in the runtime's log format, and stops them in order.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout)
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// Times of the story, from the moment that everything is ready.
const (
	failAt    = 15 * time.Second
	healAt    = 30 * time.Second
	killAt    = 42 * time.Second // the control plane dies ...
	restartAt = 47 * time.Second // ... and comes back
	leastLong = 52 * time.Second // the story needs this long
)

func run(ctx context.Context, args []string, stdout io.Writer) error {
	fs := flag.NewFlagSet("demo", flag.ContinueOnError)
	bin := fs.String("bin", "bin", "folder with control-plane, sidecar, collector, outrigger and shop")
	seconds := fs.Int("seconds", 0, "end after so many seconds with a summary; 0 goes on until Ctrl-C")
	rate := fs.Int("rate", 40, "checkouts a second, 1 to 1000")
	keep := fs.Bool("keep", false, "leave the temporary folder with logs and configuration behind")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if *seconds > 0 && time.Duration(*seconds)*time.Second < leastLong {
		return fmt.Errorf("--seconds %d is too short for the story, which takes %d s", *seconds, leastLong/time.Second)
	}
	if *rate < 1 || *rate > 1000 {
		return fmt.Errorf("--rate %d is not 1 to 1000", *rate)
	}
	dir, err := os.MkdirTemp("", "outrigger-demo-")
	if err != nil {
		return err
	}
	if *keep {
		fmt.Fprintln(stdout, "everything is kept in", dir)
	} else {
		defer func() { _ = os.RemoveAll(dir) }() // what is left of it is in the system's temporary folder
	}

	scene, err := newScene(dir, *bin)
	if err != nil {
		return err
	}
	fmt.Fprintln(stdout, "Starting control plane, collector and a shop of four services, each with its sidecar ...")
	began := time.Now()
	defer scene.stop()
	if err := scene.start(ctx); err != nil {
		return errors.Join(err, scene.lastWords())
	}
	fmt.Fprintf(stdout, "Ready after %.1f s.\n\n", time.Since(began).Seconds())
	scene.invite(stdout)

	ctx, end := context.WithCancel(ctx)
	defer end()
	if *seconds > 0 {
		time.AfterFunc(time.Duration(*seconds)*time.Second, end)
	}
	shoppers := startLoad(ctx, scene.storefrontURL(), *rate)
	tale := &story{scene: scene, shoppers: shoppers, begun: time.Now()}
	told := make(chan struct{})
	go func() { defer close(told); tale.tell(ctx) }()
	live := &screen{out: stdout, scene: scene, shoppers: shoppers, story: tale}
	live.show(ctx)
	<-told
	shoppers.wait()

	if time.Since(tale.begun) < leastLong {
		fmt.Fprintln(stdout, "\nStopped before the story ended.")
		return nil
	}
	return tale.summary(stdout)
}

func (s *scene) binary(name string) string { return filepath.Join(s.bin, name) }
