package xdsclient

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
)

// maxQueued is how many requests may wait for the control plane to read them.
const maxQueued = 64

var errNotReading = fmt.Errorf("the control plane has not read %d requests", maxQueued)

// event is what a session reports: a response or, without one, that the stream
// is open.
type event struct {
	response *discoveryv3.DeltaDiscoveryResponse
}

// session is one connection with one stream. It is over when events is closed;
// err then says why.
type session struct {
	events   chan event
	requests chan *discoveryv3.DeltaDiscoveryRequest
	cancel   context.CancelCauseFunc
	err      error

	// Of the loop that owns the session.
	started  time.Time
	named    bool // the node was sent
	answered bool // a response has arrived
}

func startSession(ctx context.Context, o Options) *session {
	ctx, cancel := context.WithCancelCause(ctx)
	s := &session{
		events: make(chan event), requests: make(chan *discoveryv3.DeltaDiscoveryRequest, maxQueued), cancel: cancel,
	}
	go func() {
		defer close(s.events)
		s.err = s.run(ctx, o)
		if cause := context.Cause(ctx); cause != nil {
			s.err = cause
		}
	}()
	return s
}

// end gives the session up and waits until its goroutines have ended.
func (s *session) end() {
	s.cancel(context.Canceled)
	for range s.events {
	}
}

func (s *session) run(ctx context.Context, o Options) (err error) {
	opts := []grpc.DialOption{
		grpc.WithTransportCredentials(o.Credentials),
		grpc.WithNoProxy(), // HTTPS_PROXY is the application's
		grpc.WithDisableServiceConfig(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
	}
	if o.PerRPC != nil {
		opts = append(opts, grpc.WithPerRPCCredentials(o.PerRPC))
	}
	conn, err := grpc.NewClient(o.Address, opts...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		return err
	}
	if !s.report(ctx, event{}) {
		return ctx.Err()
	}
	sending, stop := context.WithCancel(ctx)
	var sender sync.WaitGroup
	sender.Go(func() {
		for {
			select {
			case req := <-s.requests:
				if stream.Send(req) != nil {
					return // Recv says why
				}
			case <-sending.Done():
				return
			}
		}
	})
	if o.Beside != nil {
		sender.Go(func() { o.Beside(sending, conn) })
	}
	defer sender.Wait()
	defer stop()
	for {
		resp, err := stream.Recv()
		if err != nil {
			return fmt.Errorf("stream ended: %w", err)
		}
		if !s.report(ctx, event{response: resp}) {
			return ctx.Err()
		}
	}
}

func (s *session) report(ctx context.Context, e event) bool {
	select {
	case s.events <- e:
		return true
	case <-ctx.Done():
		return false
	}
}

// saver writes the file, because a slow disk must not hold up the table.
type saver struct {
	lists chan []saved
	out   chan error
	done  sync.WaitGroup
	busy  bool // of the owner: write was called and its result not yet received
}

func startSaver(path string) *saver {
	s := &saver{lists: make(chan []saved, 1), out: make(chan error, 1)}
	s.done.Go(func() {
		for list := range s.lists {
			s.out <- writeLastGood(path, list)
		}
	})
	return s
}

// write must not be called while busy; it never blocks.
func (s *saver) write(list []saved) {
	s.busy = true
	s.lists <- list
}

// results is where the owner receives one result for each write; of a saver
// that does not exist, never.
func (s *saver) results() <-chan error {
	if s == nil {
		return nil
	}
	return s.out
}

// stop ends an idle saver.
func (s *saver) stop() {
	close(s.lists)
	s.done.Wait()
}
