package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/rest"
)

const (
	namespaces = 20
	// perSlice is how many endpoints an EndpointSlice has at most, as Kubernetes'
	// own controller makes them.
	perSlice = 100
	// popular is how many Services many sidecars use: one destination of each is
	// among them.
	popular = 10
	// markPrefix begins the address of the endpoint that changes: the rest of it says
	// which change it is.
	markPrefix = "203."
	// workers write to the API server at once.
	workers = 16
)

func namespaceOf(service int) string { return fmt.Sprintf("mesh-%02d", service%namespaces) }

func serviceName(service int) string { return fmt.Sprintf("service-%d", service) }

// keyOf is the name of a Service's port on the wire.
func keyOf(service int) string { return namespaceOf(service) + "/" + serviceName(service) + ":80" }

// A sidecar is that of a pod behind one of the Services.
func podName(sidecar int) string { return fmt.Sprintf("pod-%d", sidecar) }

func podService(sidecar, services int) int { return sidecar % services }

func podIP(sidecar int) string { return fmt.Sprintf("10.200.%d.%d", sidecar/250, 1+sidecar%250) }

// destinations are the Services that a sidecar uses: a popular one, and others at
// random, the same in each run.
func destinations(sidecar, services, uses int) []int {
	r := rand.New(rand.NewPCG(uint64(sidecar), uint64(services)))
	out := []int{r.IntN(popular)}
	seen := map[int]bool{out[0]: true}
	for len(out) < uses {
		if s := popular + r.IntN(services-popular); !seen[s] {
			seen[s] = true
			out = append(out, s)
		}
	}
	return out
}

// mark is the address that says which change an EndpointSlice is of.
func mark(change int) string {
	return fmt.Sprintf("%s%d.%d.%d", markPrefix, change>>16&255, change>>8&255, change&255)
}

// api is an API server, spoken to as its administrator.
type api struct {
	config *rest.Config
	client *http.Client
}

func newAPI(c *rest.Config) (*api, error) {
	t, err := rest.TLSConfigFor(c)
	if err != nil {
		return nil, fmt.Errorf("credentials of the API server: %w", err)
	}
	t.MinVersion = tls.VersionTLS12
	return &api{c, &http.Client{Transport: &http.Transport{TLSClientConfig: t, MaxIdleConnsPerHost: workers}, Timeout: time.Minute}}, nil
}

func (a *api) do(ctx context.Context, method, path, contentType string, body any) error {
	text, ok := body.([]byte)
	if !ok {
		var err error
		if text, err = json.Marshal(body); err != nil {
			return fmt.Errorf("encode: %w", err)
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, a.config.Host+path, bytes.NewReader(text))
	if err != nil {
		return fmt.Errorf("the address: %w", err)
	}
	req.Header.Set("Content-Type", contentType)
	resp, err := a.client.Do(req)
	if err != nil {
		return fmt.Errorf("ask the API server: %w", err)
	}
	defer func() { _ = resp.Body.Close() }() // it was read
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("%s %s: %s: %.300s", method, path, resp.Status, answer)
	}
	return nil
}

const jsonType = "application/json"

// fill makes the objects: Services, EndpointSlices, and the pods of the sidecars.
func (a *api) fill(ctx context.Context, p plan, services int) error {
	for n := range namespaces {
		ns := corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespaceOf(n)}}
		if err := a.do(ctx, http.MethodPost, "/api/v1/namespaces", jsonType, ns); err != nil {
			return err
		}
	}
	pods := make([][]int, services)
	for i := range p.sidecars {
		s := podService(i, services)
		pods[s] = append(pods[s], i)
	}
	if err := parallel(ctx, services, func(ctx context.Context, i int) error {
		path := "/api/v1/namespaces/" + namespaceOf(i) + "/services"
		if err := a.do(ctx, http.MethodPost, path, jsonType, service(i)); err != nil {
			return err
		}
		each := p.endpoints / services
		for _, slice := range endpointSlices(i, each, pods[i]) {
			if err := a.do(ctx, http.MethodPost, slicesPath(i), jsonType, slice); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return err
	}
	return parallel(ctx, p.sidecars, func(ctx context.Context, i int) error {
		pd := pod(i, services)
		path := "/api/v1/namespaces/" + pd.Namespace + "/pods"
		if err := a.do(ctx, http.MethodPost, path, jsonType, pd); err != nil {
			return err
		}
		status := map[string]any{"status": map[string]any{"phase": "Running", "podIP": podIP(i), "podIPs": []map[string]string{{"ip": podIP(i)}}}}
		return a.do(ctx, http.MethodPatch, path+"/"+pd.Name+"/status", "application/merge-patch+json", status)
	})
}

func parallel(ctx context.Context, n int, do func(context.Context, int) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	next := make(chan int)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for i := range next {
				if err := do(ctx, i); err != nil {
					cancel(err)
					return
				}
			}
		})
	}
	for i := range n {
		select {
		case next <- i:
		case <-ctx.Done():
		}
	}
	close(next)
	wg.Wait()
	return context.Cause(ctx)
}

func service(i int) corev1.Service {
	return corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespaceOf(i), Name: serviceName(i)},
		Spec: corev1.ServiceSpec{
			Selector: map[string]string{"app": serviceName(i)},
			Ports:    []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromInt32(8080)}},
		},
	}
}

func slicesPath(service int) string {
	return "/apis/discovery.k8s.io/v1/namespaces/" + namespaceOf(service) + "/endpointslices"
}

// endpointSlices are those of a Service. The first endpoint of all is the one that
// changes; then come the pods that there are, and others that nobody has made.
func endpointSlices(i, endpoints int, pods []int) []discoveryv1.EndpointSlice {
	var out []discoveryv1.EndpointSlice
	name, port, ready := "http", int32(8080), true
	for n := range endpoints {
		if n%perSlice == 0 {
			out = append(out, discoveryv1.EndpointSlice{
				ObjectMeta: metav1.ObjectMeta{
					Namespace: namespaceOf(i), Name: sliceName(i, n/perSlice), Labels: map[string]string{discoveryv1.LabelServiceName: serviceName(i)},
				},
				AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: &name, Port: &port}},
			})
		}
		zone := "zone-" + strconv.Itoa(n%3)
		global := i*endpoints + n
		address, target := fmt.Sprintf("10.%d.%d.%d", global>>16&127, global>>8&255, global&255), fmt.Sprintf("%s-%d", serviceName(i), n)
		switch {
		case n == 0:
			address = mark(0)
		case n-1 < len(pods):
			address, target = podIP(pods[n-1]), podName(pods[n-1])
		}
		last := &out[len(out)-1]
		last.Endpoints = append(last.Endpoints, discoveryv1.Endpoint{
			Addresses: []string{address}, Conditions: discoveryv1.EndpointConditions{Ready: &ready}, Zone: &zone,
			TargetRef: &corev1.ObjectReference{Kind: "Pod", Namespace: namespaceOf(i), Name: target},
		})
	}
	return out
}

func sliceName(service, n int) string { return fmt.Sprintf("%s-%d", serviceName(service), n) }

// pod is that of a sidecar.
func pod(i, services int) corev1.Pod {
	s := podService(i, services)
	return corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: namespaceOf(s), Name: podName(i), Labels: map[string]string{"app": serviceName(s)},
			Annotations: map[string]string{"outrigger.dev/status": "injected"},
		},
		Spec: corev1.PodSpec{
			ServiceAccountName: "default",
			Containers: []corev1.Container{
				{Name: "application", Image: "application", Ports: []corev1.ContainerPort{{ContainerPort: 8080}}},
				{Name: "outrigger-proxy", Image: "outrigger/sidecar"},
			},
		},
	}
}

// change moves one endpoint of a Service to the address that says which change it
// is.
func (a *api) change(ctx context.Context, service, n int) error {
	patch := fmt.Sprintf(`[{"op":"replace","path":"/endpoints/0/addresses/0","value":%q}]`, mark(n))
	return a.do(ctx, http.MethodPatch, slicesPath(service)+"/"+sliceName(service, 0), "application/json-patch+json", []byte(patch))
}

// kubeconfig writes what the control plane connects with.
func (a *api) kubeconfig(dir string) (string, error) {
	type m = map[string]any
	t := a.config.TLSClientConfig
	path := filepath.Join(dir, "kubeconfig")
	text, err := json.Marshal(m{
		"apiVersion": "v1", "kind": "Config", "current-context": "bench",
		"clusters": []m{{"name": "bench", "cluster": m{"server": a.config.Host, "certificate-authority-data": t.CAData}}},
		"users":    []m{{"name": "bench", "user": m{"client-certificate-data": t.CertData, "client-key-data": t.KeyData}}},
		"contexts": []m{{"name": "bench", "context": m{"cluster": "bench", "user": "bench"}}},
	})
	if err != nil {
		return "", fmt.Errorf("encode the kubeconfig: %w", err)
	}
	return path, os.WriteFile(path, text, 0o600)
}
