package upstream

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/balance"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
)

// A request may have chosen its endpoint just before that left the cluster.
func TestStreamOfAnEndpointThatHasGone(t *testing.T) {
	var dials atomic.Int32
	s := httptest.NewUnstartedServer(http.NotFoundHandler())
	s.Config.Protocols = &http.Protocols{}
	s.Config.Protocols.SetUnencryptedHTTP2(true)
	s.Config.ConnState = func(_ net.Conn, st http.ConnState) {
		if st == http.StateNew {
			dials.Add(1)
		}
	}
	s.Start()
	t.Cleanup(s.Close)
	cs := set()
	a := netip.MustParseAddrPort(s.Listener.Addr().String())
	c := cs.For(tableOf(&table.Cluster{Name: name, HTTP2: true, Endpoints: []balance.Endpoint{endpoint(a)}}), name)
	e := c.Endpoints()[0]
	cs.For(tableOf(&table.Cluster{Name: name, HTTP2: true}), name)
	stream, err := e.Open(context.Background(), time.Now().Add(500*time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	stream.Close(time.Now())
	for deadline := time.Now().Add(2 * time.Second); c.Usage() != (Usage{}) && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	use(t, c, Usage{})
	cs.open.cut()
	s.Close() // after which the server has told of all
	if n := dials.Load(); n != 1 {
		t.Errorf("%d connections were made; want one", n)
	}
}
