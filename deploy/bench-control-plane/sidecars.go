package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/stats"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// sidecarsCommand makes this program the process of the sidecars.
const sidecarsCommand = "sidecars"

const (
	listenerType = "type.googleapis.com/envoy.config.listener.v3.Listener"
	routeType    = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
	clusterType  = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	endpointType = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
)

// event is a line that the process of the sidecars writes.
type event struct {
	Synced bool  `json:"synced,omitempty"` // every sidecar has all that it uses
	Bytes  int64 `json:"bytes,omitempty"`  // that all have received so far; answers a line of input
	// Every sidecar that uses the Service has acknowledged the Change, and all before.
	Service int   `json:"service,omitempty"`
	Change  int   `json:"change,omitempty"`
	At      int64 `json:"at,omitempty"` // Unix time in ns
}

// fleet is all sidecars.
type fleet struct {
	services int
	bytes    atomic.Int64
	open     atomic.Int64 // resources that have not come yet
	synced   chan struct{}
	users    []users // by Service
	events   chan event
}

// users are the sidecars that use a Service, and the last change that each has
// acknowledged.
type users struct {
	mu   sync.Mutex
	last map[int]int // by sidecar
	all  int         // what all have
}

// runSidecars connects as many sidecars as it is told to and keeps them until its
// input ends.
func runSidecars(ctx context.Context, args []string, stdin io.Reader, stdout io.Writer) error {
	var address string
	var sidecars, uses int
	f := &fleet{synced: make(chan struct{}), events: make(chan event, 1<<16)}
	fs := flag.NewFlagSet(sidecarsCommand, flag.ContinueOnError)
	fs.StringVar(&address, "address", "", "of the control plane")
	fs.IntVar(&sidecars, "sidecars", 0, "how many")
	fs.IntVar(&f.services, "services", 0, "in the mesh")
	fs.IntVar(&uses, "uses", 0, "destinations of each")
	if err := fs.Parse(args); err != nil {
		return err
	}
	f.users = make([]users, f.services)
	for i := range sidecars {
		for _, s := range destinations(i, f.services, uses) {
			if f.users[s].last == nil {
				f.users[s].last = map[int]int{}
			}
			f.users[s].last[i] = 0
		}
	}
	f.open.Store(int64(sidecars * (4*uses + 1)))

	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel(nil)
	wg.Go(func() { cancel(f.write(ctx, stdout)) })
	wg.Go(func() {
		select {
		case <-f.synced:
			f.events <- event{Synced: true}
		case <-ctx.Done():
		}
	})
	slots := make(chan struct{}, 32) // connect at once
	for i := range sidecars {
		wg.Go(func() {
			if err := f.sidecar(ctx, address, i, uses, slots); err != nil && ctx.Err() == nil {
				cancel(fmt.Errorf("sidecar %d: %w", i, err))
			}
		})
	}
	input := make(chan struct{})
	go func() { // ends with the process
		defer close(input)
		for lines := bufio.NewScanner(stdin); lines.Scan(); {
			f.events <- event{Bytes: f.bytes.Load()}
		}
	}()
	select {
	case <-input:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (f *fleet) write(ctx context.Context, out io.Writer) error {
	b := bufio.NewWriter(out)
	e := json.NewEncoder(b)
	for {
		select {
		case <-ctx.Done():
			return nil
		case ev := <-f.events:
			if err := e.Encode(ev); err != nil {
				return fmt.Errorf("write: %w", err)
			}
			if len(f.events) == 0 {
				if err := b.Flush(); err != nil {
					return fmt.Errorf("write: %w", err)
				}
			}
		}
	}
}

// sidecar asks for what it uses and acknowledges all that comes.
func (f *fleet) sidecar(ctx context.Context, address string, i, uses int, slots chan struct{}) error {
	slots <- struct{}{}
	busy := true
	release := func() {
		if busy {
			busy = false
			<-slots
		}
	}
	defer release()
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy(), grpc.WithDisableServiceConfig(),
		grpc.WithStatsHandler(counter{&f.bytes}), grpc.WithReadBufferSize(4<<10), grpc.WithWriteBufferSize(4<<10),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer func() { _ = conn.Close() }() // there is nothing left to lose
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		return fmt.Errorf("open the stream: %w", err)
	}
	home := podService(i, f.services)
	node := &corev3.Node{
		Id: podName(i) + "." + namespaceOf(home), UserAgentName: bootstrap.UserAgent,
		Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{
			bootstrap.MetaNamespace:      structpb.NewStringValue(namespaceOf(home)),
			bootstrap.MetaServiceAccount: structpb.NewStringValue("default"),
			bootstrap.MetaWorkload:       structpb.NewStringValue(serviceName(home)),
		}},
	}
	byKey := map[string]int{}
	var keys, listeners []string
	for _, s := range destinations(i, f.services, uses) {
		byKey[keyOf(s)] = s
		keys, listeners = append(keys, keyOf(s)), append(listeners, "outbound/"+keyOf(s))
	}
	listeners = append(listeners, "inbound/"+namespaceOf(home)+"/"+podName(i))
	for _, ask := range []*discoveryv3.DeltaDiscoveryRequest{
		{Node: node, TypeUrl: listenerType, ResourceNamesSubscribe: listeners},
		{TypeUrl: routeType, ResourceNamesSubscribe: keys},
		{TypeUrl: clusterType, ResourceNamesSubscribe: keys},
		{TypeUrl: endpointType, ResourceNamesSubscribe: keys},
	} {
		if err := stream.Send(ask); err != nil {
			return fmt.Errorf("subscribe: %w", err)
		}
	}
	has := make(map[string]bool, 4*uses+1)
	for {
		resp, err := stream.Recv()
		if err != nil {
			return fmt.Errorf("receive: %w", err)
		}
		if n := len(resp.GetRemovedResources()); n > 0 {
			return fmt.Errorf("%d resources do not exist, for example %s", n, resp.GetRemovedResources()[0])
		}
		if err := stream.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: resp.GetTypeUrl(), ResponseNonce: resp.GetNonce()}); err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("acknowledge: %w", err)
		}
		now := time.Now()
		for _, r := range resp.GetResources() {
			if resp.GetTypeUrl() == endpointType {
				f.arrived(byKey[r.GetName()], i, changeIn(r.GetResource().GetValue()), now)
			}
			if name := resp.GetTypeUrl() + r.GetName(); !has[name] {
				has[name] = true
				if len(has) == 4*uses+1 {
					release()
				}
				if f.open.Add(-1) == 0 {
					close(f.synced)
				}
			}
		}
	}
}

// arrived notes what a sidecar has acknowledged, and tells when it was the last.
func (f *fleet) arrived(service, sidecar, change int, at time.Time) {
	u := &f.users[service]
	u.mu.Lock()
	defer u.mu.Unlock()
	if change <= u.last[sidecar] {
		return
	}
	u.last[sidecar] = change
	least := change
	for _, c := range u.last {
		least = min(least, c)
	}
	if least > u.all {
		u.all = least
		f.events <- event{Service: service, Change: least, At: at.UnixNano()}
	}
}

// changeIn finds the address that says which change it is. What comes before a
// string is its length, which is no digit and no dot.
func changeIn(encoded []byte) int {
	rest := encoded
	for {
		i := bytes.Index(rest, []byte(markPrefix))
		if i < 0 {
			return 0
		}
		before := byte(0)
		if i > 0 {
			before = rest[i-1]
		}
		rest = rest[i+len(markPrefix):]
		if before != '.' && (before < '0' || before > '9') {
			break
		}
	}
	n, part := 0, 0
	for _, c := range rest {
		switch {
		case c >= '0' && c <= '9':
			part = part*10 + int(c-'0')
		case c == '.':
			n, part = n<<8|part, 0
		default:
			return n<<8 | part
		}
	}
	return n<<8 | part
}

// counter counts what is received, as it was on the wire.
type counter struct{ bytes *atomic.Int64 }

// TagRPC implements stats.Handler.
func (counter) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context { return ctx }

// HandleRPC implements stats.Handler.
func (c counter) HandleRPC(_ context.Context, s stats.RPCStats) {
	if in, ok := s.(*stats.InPayload); ok {
		c.bytes.Add(int64(in.WireLength))
	}
}

// TagConn implements stats.Handler.
func (counter) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }

// HandleConn implements stats.Handler.
func (counter) HandleConn(context.Context, stats.ConnStats) {}

// sidecarArgs are those of the process.
func sidecarArgs(address string, p plan, services int) []string {
	return []string{
		sidecarsCommand, "--address", address, "--sidecars", strconv.Itoa(p.sidecars), "--services", strconv.Itoa(services), "--uses", strconv.Itoa(p.uses),
	}
}
