package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"
)

// Forward leads a port on loopback to a port of a pod, on its loopback too, as kubectl
// port-forward does, until stop is called.
func (c *Cluster) Forward(ctx context.Context, namespace, pod string, port int) (address string, stop func(), err error) {
	transport, upgrader, err := spdy.RoundTripperFor(c.Config)
	if err != nil {
		return "", nil, fmt.Errorf("port-forward to %s/%s: %w", namespace, pod, err)
	}
	url := c.Client.CoreV1().RESTClient().Post().Resource("pods").Namespace(namespace).Name(pod).SubResource("portforward").URL()
	end, ready := make(chan struct{}), make(chan struct{})
	var told bytes.Buffer
	f, err := portforward.New(spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, url), []string{"0:" + strconv.Itoa(port)}, end, ready, nil, &told)
	if err != nil {
		return "", nil, fmt.Errorf("port-forward to %s/%s: %w", namespace, pod, err)
	}
	done := make(chan struct{})
	var ended error
	go func() {
		ended = f.ForwardPorts()
		close(done)
	}()
	stop = func() {
		close(end)
		<-done
	}
	select {
	case <-done:
		return "", nil, fmt.Errorf("port-forward to %s/%s: %w: %s", namespace, pod, ended, told.String())
	case <-ctx.Done():
		stop()
		return "", nil, ctx.Err()
	case <-time.After(20 * time.Second):
		stop()
		return "", nil, errors.New("port-forward to " + namespace + "/" + pod + " is not ready after 20 s")
	case <-ready:
	}
	ports, err := f.GetPorts()
	if err != nil {
		stop()
		return "", nil, fmt.Errorf("port-forward to %s/%s: %w", namespace, pod, err)
	}
	return "127.0.0.1:" + strconv.Itoa(int(ports[0].Local)), stop, nil
}
