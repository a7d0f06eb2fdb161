// Package xdsclient keeps the sidecar's routing table equal to what the control
// plane says: one delta ADS stream that asks by name for the destinations that
// are wanted and for whatever they refer to, and nothing else.
//
//	destination K -> listener outbound/K -> routes -> clusters -> endpoints
//	those who call -> listener inbound/<namespace>/<instance>
//
// It owns the stream, the subscriptions and the file of the last good
// configuration; decoding (decode.go, metadata.go) and the graph of resources
// (store.go) are pure. It knows nothing of requests: the proxy reads the Table
// that it publishes, and main says what is wanted. A configuration is published
// once all that it refers to has arrived (make before break); a version that
// cannot be used is refused, with the reason, and the one before stays in force.
package xdsclient

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
)

const (
	// MaxWanted is how many destinations one proxy may want.
	MaxWanted = 1024
	// maxKey bounds the key of a destination, in bytes.
	maxKey = 512
	// maxMessage bounds one response of the control plane, in bytes.
	maxMessage = 16 << 20
	// maxNack bounds the reason sent back for a rejected response, in bytes.
	maxNack = 4 << 10

	backoffMin  = 100 * time.Millisecond
	backoffMax  = 5 * time.Second
	warnEvery   = 30 * time.Second
	saveEvery   = time.Second
	damagedName = ".damaged"
)

// ErrTooManyWanted says that MaxWanted is reached.
var ErrTooManyWanted = errors.New("too many destinations")

// Options of a Client. Address, Node and Table are required.
type Options struct {
	// Address of the control plane, host:port.
	Address string
	// Credentials of the connection. Nil is clear text, which Run refuses for an
	// address that is not on the loopback interface.
	Credentials credentials.TransportCredentials
	// PerRPC adds, for example, the workload's token. It may be nil.
	PerRPC credentials.PerRPCCredentials
	Node   bootstrap.Config
	// Beside is called on each connection once its stream is open, and must return
	// when ctx ends: the connection is over then. It may be nil.
	Beside func(ctx context.Context, conn grpc.ClientConnInterface)
	// StateFile keeps the last good configuration; empty keeps none. Its
	// directory must exist.
	StateFile string
	Table     *table.Current
	// Log is slog.Default where nil.
	Log *slog.Logger
	// Registerer takes the metrics; nil registers none.
	Registerer prometheus.Registerer
	// Now is time.Now where nil.
	Now func() time.Time
}

// Client is made by New, told what is wanted by Want, and works while Run runs.
// Its methods are safe for concurrent use.
type Client struct {
	o       Options
	node    *corev3.Node
	nodeErr error
	metrics *metrics
	wake    chan struct{}
	ready   chan struct{}

	mu        sync.Mutex
	loaded    bool
	store     *store
	readyDone bool
	status    Status // without what is collected on demand
}

// New makes a Client; it does nothing until Run. A Registerer that already has
// its metrics makes it panic.
func New(o Options) *Client {
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	c := &Client{
		o: o, metrics: newMetrics(o.Registerer), wake: make(chan struct{}, 1), ready: make(chan struct{}),
		store: newStore(o.StateFile != ""), status: Status{Address: o.Address},
	}
	meta, err := structpb.NewStruct(o.Node.Metadata())
	c.nodeErr = err
	c.node = &corev3.Node{
		Id: o.Node.NodeID(), Cluster: o.Node.Workload + "." + o.Node.Namespace, Metadata: meta,
		UserAgentName: bootstrap.UserAgent,
	}
	if o.Node.Capture {
		c.store.inbound = o.Node.InboundName()
	}
	return c
}

// Want asks for destinations, <namespace>/<service>:<port> or <virtual
// IP>:<port>. Those already wanted change nothing. Keys that cannot be a
// destination and those beyond MaxWanted are refused with an error that names
// the first of them; the others are wanted nevertheless.
func (c *Client) Want(keys ...string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var first error
	for _, key := range keys {
		switch {
		case c.store.wanted[key]:
			continue
		case key == "" || len(key) > maxKey || strings.ContainsFunc(key, func(r rune) bool { return r <= ' ' || r == '*' }):
			c.metrics.refused.Inc()
			if first == nil {
				first = fmt.Errorf("destination %.100q is not <namespace>/<service>:<port>", key)
			}
			continue
		case len(c.store.wanted) >= MaxWanted:
			c.metrics.refused.Inc()
			if first == nil {
				first = fmt.Errorf("destination %q: %w: %d are wanted, which is the most that one proxy may want", key, ErrTooManyWanted, MaxWanted)
			}
			continue
		}
		c.store.wanted[key] = true
	}
	select {
	case c.wake <- struct{}{}:
	default: // it will look anyway
	}
	return first
}

// Forget ends what Want began: the destinations leave the Table, and the control
// plane is not asked about them any more.
func (c *Client) Forget(keys ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, key := range keys {
		delete(c.store.wanted, key)
	}
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// Restore reads the last good configuration, unless that was done already, and
// returns the destinations in it that had been captured and led to a service,
// <IP>:<port>. Those that are wanted again are in the Table as soon as Run runs,
// whether the control plane is there or not.
func (c *Client) Restore() (keys []string) {
	c.mu.Lock()
	loaded := c.loaded
	c.loaded = true
	c.mu.Unlock()
	if !loaded && c.o.StateFile != "" {
		c.load()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for name, r := range c.store.spare[listeners] {
		key, ok := strings.CutPrefix(name, listenerPrefix)
		if ok && captured(key) && !r.missing {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys
}

// Ready is closed once every destination that is wanted by then has an answer, and
// so has what is asked of callers, from the control plane or from the last good
// configuration, and Run runs. Captured destinations do not count. It stays closed.
func (c *Client) Ready() <-chan struct{} { return c.ready }

// Run keeps the table up to date until ctx ends, reconnecting for ever. All its
// goroutines have ended when it returns. Its error is a mistake in Options.
func (c *Client) Run(ctx context.Context) error {
	switch {
	case c.nodeErr != nil:
		return fmt.Errorf("node metadata: %w", c.nodeErr)
	case c.o.Credentials == nil && !loopback(c.o.Address):
		return fmt.Errorf("control plane %s is not on the loopback interface and no credentials are given; configuration is not fetched in clear text over a network", c.o.Address)
	case c.o.Credentials == nil:
		c.o.Credentials = insecure.NewCredentials()
	}
	r := &run{Client: c, ctx: ctx, backoff: backoffMin}
	c.Restore()
	if c.o.StateFile != "" {
		r.saver = startSaver(c.o.StateFile)
	}
	return r.loop()
}

func loopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// load takes the last good configuration over. It never fails: a sidecar that
// has none asks the control plane.
func (c *Client) load() {
	list, err := readLastGood(c.o.StateFile)
	if errors.Is(err, errDamaged) {
		aside := c.o.StateFile + damagedName
		rerr := os.Rename(c.o.StateFile, aside)
		c.o.Log.Warn("last good configuration is damaged; it is set aside and the control plane asked",
			"file.path", c.o.StateFile, "moved_to", aside, "error.message", errors.Join(err, rerr).Error())
		return
	}
	if err != nil {
		c.o.Log.Warn("cannot read the last good configuration; check the owner and mode of the file",
			"file.path", c.o.StateFile, "error.message", err.Error())
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range list {
		if err := c.store.restore(s.kind, s.name, s.version, s.raw, s.missing); err != nil {
			c.o.Log.Warn("a resource of the last good configuration cannot be used; it will be asked for again", "error.message", err.Error())
		}
	}
	if len(list) > 0 {
		c.status.FromFile = true
	}
}

// run is one call of Run: the loop that owns the stream. Only the loop uses it.
type run struct {
	*Client
	ctx     context.Context //nolint:containedctx // run is one call
	backoff time.Duration
	session *session // nil while there is none
	saver   *saver   // nil without a file

	reconnect time.Time // when to try again; zero while there is a session
	patience  time.Time // when build has to look again
	unsaved   bool
	saved     time.Time // when the file was written last
	nextWarn  time.Time
	failures  int  // since the last warning
	told      bool // that the control plane answers, since the last warning
	saveWarn  time.Time
}

func (r *run) loop() error {
	r.apply()
	r.connect()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		timer.Reset(r.untilNext())
		var events <-chan event
		if r.session != nil {
			events = r.session.events
		}
		select {
		case <-r.ctx.Done():
			r.stop()
			return nil
		case <-r.wake:
			r.apply()
		case e, ok := <-events:
			switch {
			case !ok:
				r.lost()
			case e.response == nil:
				r.opened()
			default:
				r.respond(e.response)
			}
		case err := <-r.saver.results():
			r.savedAs(err)
		case <-timer.C:
			r.due()
		}
	}
}

// untilNext is how long nothing is due.
func (r *run) untilNext() time.Duration {
	next := []time.Time{r.reconnect, r.patience}
	if r.unsaved && !r.saver.busy {
		next = append(next, r.saved.Add(saveEvery))
	}
	now, wait := r.o.Now(), time.Hour
	for _, t := range next {
		if !t.IsZero() {
			wait = min(wait, max(t.Sub(now), 0))
		}
	}
	return wait
}

func (r *run) due() {
	now := r.o.Now()
	if !r.patience.IsZero() && !now.Before(r.patience) {
		r.apply()
	}
	if r.unsaved && !r.saver.busy && now.Sub(r.saved) >= saveEvery {
		r.save()
	}
	if !r.reconnect.IsZero() && !now.Before(r.reconnect) {
		r.connect()
	}
}

func (r *run) stop() {
	if r.session != nil {
		r.session.end()
		r.disconnected()
	}
	if r.saver != nil {
		if r.saver.busy {
			r.savedAs(<-r.saver.out)
		}
		if r.unsaved {
			r.save()
			r.savedAs(<-r.saver.out)
		}
		r.saver.stop()
	}
}

func (r *run) connect() {
	r.reconnect = time.Time{}
	r.session = startSession(r.ctx, r.o)
	r.session.started = r.o.Now()
}

func (r *run) lost() {
	err := r.session.err
	// A control plane that answers and at once hangs up must not be met ten times
	// a second by every sidecar.
	if r.session.answered && r.o.Now().Sub(r.session.started) >= backoffMax {
		r.backoff = backoffMin
	}
	r.session.end()
	r.session = nil
	r.disconnected()
	r.failed(err)
}

// opened asks for everything that is needed, and says which versions are known.
func (r *run) opened() {
	r.metrics.connected.Set(1)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.status.Connected, r.status.Since = true, r.o.Now()
	for k := range kinds {
		names := make([]string, 0, len(r.store.res[k]))
		for name := range r.store.res[k] {
			names = append(names, name)
		}
		if len(names) == 0 {
			continue // it would be taken for a wildcard
		}
		slices.Sort(names)
		r.send(&discoveryv3.DeltaDiscoveryRequest{
			TypeUrl: k.typeURL(), ResourceNamesSubscribe: names, InitialResourceVersions: r.store.versions(k),
		})
	}
}

func (r *run) disconnected() {
	r.metrics.connected.Set(0)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.status.Connected = false
}

// failed plans the next attempt. The first failure is told at once, those after
// it together, every half minute.
func (r *run) failed(err error) {
	r.metrics.reconnects.Inc()
	now := r.o.Now()
	wait := r.backoff/2 + rand.N(r.backoff/2)
	r.backoff = min(2*r.backoff, backoffMax)
	r.reconnect = now.Add(wait)
	r.failures++
	r.mu.Lock()
	r.status.LastError, r.status.LastErrorAt = err.Error(), now
	r.status.Reconnects++
	r.mu.Unlock()
	if now.Before(r.nextWarn) {
		return
	}
	r.nextWarn = now.Add(warnEvery)
	r.o.Log.Warn("no configuration from the control plane; the sidecar goes on with what it has. Check that it runs and that --control-plane is its address",
		"server.address", r.o.Address, "error.message", err.Error(), "failures", r.failures)
	r.failures, r.told = 0, false
}

// send queues a request. A control plane that does not read its requests is
// given up.
func (r *run) send(req *discoveryv3.DeltaDiscoveryRequest) {
	if !r.session.named {
		r.session.named = true
		req.Node = r.node
	}
	select {
	case r.session.requests <- req:
	default:
		r.session.cancel(errNotReading)
	}
}

// respond takes in a response, acknowledges it, and publishes what follows.
func (r *run) respond(resp *discoveryv3.DeltaDiscoveryResponse) {
	if !r.session.answered {
		r.session.answered = true
		if !r.told {
			r.told = true
			r.o.Log.Info("control plane answers", "server.address", r.o.Address)
		}
	}
	ack := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: resp.GetTypeUrl(), ResponseNonce: resp.GetNonce()}
	reasons := r.take(resp)
	if len(reasons) > 0 {
		message := strings.ToValidUTF8(strings.Join(reasons, "; "), "?")
		if len(message) > maxNack {
			message = strings.ToValidUTF8(message[:maxNack], "")
		}
		ack.ErrorDetail = &rpcstatus.Status{Code: int32(codes.InvalidArgument), Message: message}
		r.o.Log.Warn("configuration rejected; the version before stays in force", "xds.type", resp.GetTypeUrl(), "error.message", message)
	}
	r.send(ack)
	r.apply()
}

// take puts a response into the store and returns why resources were rejected.
func (r *run) take(resp *discoveryv3.DeltaDiscoveryResponse) (reasons []string) {
	k, ok := kindOf(resp.GetTypeUrl())
	if !ok {
		return []string{fmt.Sprintf("type %q was not asked for", resp.GetTypeUrl())}
	}
	count := func(result string) { r.metrics.updates.WithLabelValues(k.String(), result).Inc() }
	r.mu.Lock()
	defer r.mu.Unlock()
	r.store.forgetSpare() // the control plane is there: ask it
	for _, in := range resp.GetResources() {
		var err error
		switch url := in.GetResource().GetTypeUrl(); {
		case in.GetResource() == nil: // a heartbeat (TTL): nothing changed
			continue
		case url != resp.GetTypeUrl():
			err = fmt.Errorf("%s %s: its type is %q", k, in.GetName(), url)
		default:
			err = r.store.accept(k, in.GetName(), in.GetVersion(), in.GetResource().GetValue())
		}
		if err != nil {
			count("rejected")
			reasons = append(reasons, err.Error())
			continue
		}
		count("accepted")
		r.unsaved = r.saver != nil
	}
	for _, name := range resp.GetRemovedResources() {
		if r.store.remove(k, name) {
			count("removed")
			r.unsaved = r.saver != nil
		}
	}
	now := r.o.Now()
	r.metrics.lastUpdate.Set(float64(now.UnixMilli()) / 1000)
	st := &r.status.Types[k]
	st.Nonce, st.At = resp.GetNonce(), now
	if len(reasons) > 0 {
		st.Nacks++
		st.LastNack = strings.Join(reasons, "; ")
	} else {
		st.Acks++
	}
	return reasons
}

// apply makes subscriptions and table follow what is wanted and known.
func (r *run) apply() {
	r.mu.Lock()
	defer r.mu.Unlock()
	subscribe, unsubscribe := r.store.reconcile()
	t, next := r.store.build(r.o.Now())
	r.patience = next
	if t != nil {
		r.o.Table.Store(t)
		r.status.TableVersion = t.Version
		r.metrics.destinations.Set(float64(len(t.Destinations)))
		r.o.Log.Debug("configuration published", "outrigger.config_version", t.Version, "destinations", len(t.Destinations), "clusters", len(t.Clusters))
		// Another table may need less: what only the old one referred to.
		more, less := r.store.reconcile()
		for k := range kinds {
			subscribe[k] = append(subscribe[k], more[k]...)
			unsubscribe[k] = append(unsubscribe[k], less[k]...)
		}
	}
	if r.session != nil && r.status.Connected {
		for k := range kinds {
			if len(subscribe[k])+len(unsubscribe[k]) > 0 {
				r.send(&discoveryv3.DeltaDiscoveryRequest{
					TypeUrl: k.typeURL(), ResourceNamesSubscribe: subscribe[k], ResourceNamesUnsubscribe: unsubscribe[k],
				})
			}
		}
	}
	if !r.readyDone && r.store.allAnswered() {
		r.readyDone = true
		close(r.ready)
	}
}

func (r *run) save() {
	r.mu.Lock()
	list := r.store.snapshot()
	r.mu.Unlock()
	r.unsaved = false
	r.saver.write(list)
}

func (r *run) savedAs(err error) {
	now := r.o.Now()
	r.saved, r.saver.busy = now, false
	if err == nil {
		r.metrics.saves.WithLabelValues("written").Inc()
		return
	}
	r.unsaved = true
	r.metrics.saves.WithLabelValues("failed").Inc()
	if now.Before(r.saveWarn) {
		return
	}
	r.saveWarn = now.Add(warnEvery)
	r.o.Log.Warn("cannot keep the last good configuration; a restart without the control plane would have none. Check that the directory exists and is writable",
		"file.path", r.o.StateFile, "error.message", err.Error())
}
