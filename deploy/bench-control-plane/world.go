package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/outrigger-mesh/outrigger/deploy/testbed"
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

func podIP(pod int) string { return fmt.Sprintf("10.%d.%d.%d", 200+pod>>16, pod>>8&255, pod&255) }

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
	server *testbed.Server
	client *http.Client
}

func newAPI(s *testbed.Server) (*api, error) {
	c := s.Config.TLSClientConfig
	pair, err := tls.X509KeyPair(c.CertData, c.KeyData)
	if err != nil {
		return nil, fmt.Errorf("credentials of the API server: %w", err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(c.CAData)
	return &api{s, &http.Client{
		Transport: &http.Transport{
			TLSClientConfig:     &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots, Certificates: []tls.Certificate{pair}},
			MaxIdleConnsPerHost: workers, ForceAttemptHTTP2: true,
		},
		Timeout: time.Minute,
	}}, nil
}

func (a *api) do(ctx context.Context, method, path, contentType string, body any) error {
	text, ok := body.([]byte)
	if !ok {
		var err error
		if text, err = json.Marshal(body); err != nil {
			return fmt.Errorf("encode: %w", err)
		}
	}
	return post(ctx, a.client, method, a.server.Config.Host+path, contentType, text)
}

func post(ctx context.Context, client *http.Client, method, url, contentType string, text []byte) error {
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(text))
	if err != nil {
		return fmt.Errorf("the address: %w", err)
	}
	req.Header.Set("Content-Type", contentType)
	resp, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("ask: %w", err)
	}
	defer func() { _ = resp.Body.Close() }() // it was read
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, url, err)
	}
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("%s %s: %s: %.300s", method, url, resp.Status, answer)
	}
	return nil
}

const jsonType = "application/json"

// objects are all that there are: Services with their EndpointSlices, and pods.
func objects(p plan, services int) iter.Seq2[string, any] {
	made := metav1.NewTime(time.Now().Truncate(time.Second))
	pods := make([][]int, services)
	for i := range p.pods {
		s := podService(i, services)
		pods[s] = append(pods[s], i)
	}
	n := 0
	known := func(o metav1.Object) {
		n++
		o.SetUID(types.UID(fmt.Sprintf("00000000-0000-4000-8000-%012x", n)))
		o.SetCreationTimestamp(made)
	}
	return func(yield func(string, any) bool) {
		for i := range namespaces {
			ns := &corev1.Namespace{
				TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"}, ObjectMeta: metav1.ObjectMeta{Name: namespaceOf(i)},
				Status: corev1.NamespaceStatus{Phase: corev1.NamespaceActive},
			}
			if known(ns); !yield("namespaces/"+ns.Name, ns) {
				return
			}
		}
		for i := range services {
			s := service(i)
			if known(s); !yield("services/specs/"+s.Namespace+"/"+s.Name, s) {
				return
			}
			ip := ipAddress(s)
			if known(ip); !yield("ipaddresses/"+ip.Name, ip) {
				return
			}
			for _, slice := range endpointSlices(i, p.endpoints/services, pods[i]) {
				if known(slice); !yield("endpointslices/"+slice.Namespace+"/"+slice.Name, slice) {
					return
				}
			}
		}
		for i := range p.pods {
			pd := pod(i, services)
			if known(pd); !yield("pods/"+pd.Namespace+"/"+pd.Name, pd) {
				return
			}
		}
	}
}

// fill puts all objects into etcd, where the API server finds them: its own way in
// takes it some 20 ms of CPU time for a Service.
func fill(ctx context.Context, etcd string, p plan, services int) error {
	type put struct {
		Key   []byte `json:"key"`
		Value []byte `json:"value"`
	}
	type op struct {
		RequestPut put `json:"requestPut"`
	}
	client := &http.Client{Timeout: time.Minute}
	var batch []op
	size := 0
	flush := func() error {
		text, err := json.Marshal(map[string]any{"success": batch})
		if err != nil {
			return fmt.Errorf("encode: %w", err)
		}
		batch, size = batch[:0], 0
		return post(ctx, client, http.MethodPost, etcd+"/v3/kv/txn", jsonType, text)
	}
	// The limits of etcd are 128 and 1.5 MiB.
	const most, mostBytes = 100, 1 << 19
	for name, o := range objects(p, services) {
		value, err := json.Marshal(o)
		if err != nil {
			return fmt.Errorf("encode: %w", err)
		}
		batch = append(batch, op{put{[]byte("/registry/" + name), value}})
		if size += len(value); len(batch) == most || size > mostBytes {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	return flush()
}

func service(i int) *corev1.Service {
	single, cluster := corev1.IPFamilyPolicySingleStack, corev1.ServiceInternalTrafficPolicyCluster
	ip := fmt.Sprintf("10.96.%d.%d", 1+i/250, 1+i%250)
	return &corev1.Service{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Service"},
		ObjectMeta: metav1.ObjectMeta{Namespace: namespaceOf(i), Name: serviceName(i)},
		Spec: corev1.ServiceSpec{
			Selector: map[string]string{"app": serviceName(i)}, Type: corev1.ServiceTypeClusterIP, SessionAffinity: corev1.ServiceAffinityNone,
			ClusterIP: ip, ClusterIPs: []string{ip}, IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol}, IPFamilyPolicy: &single, InternalTrafficPolicy: &cluster,
			Ports: []corev1.ServicePort{{Name: "http", Port: 80, Protocol: corev1.ProtocolTCP, TargetPort: intstr.FromInt32(8080)}},
		},
	}
}

// ipAddress says whose an address is. Without it the API server would make it.
func ipAddress(s *corev1.Service) *networkingv1.IPAddress {
	return &networkingv1.IPAddress{
		TypeMeta: metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "IPAddress"},
		ObjectMeta: metav1.ObjectMeta{Name: s.Spec.ClusterIP, Labels: map[string]string{
			networkingv1.LabelIPAddressFamily: string(corev1.IPv4Protocol), networkingv1.LabelManagedBy: "ipallocator.k8s.io",
		}},
		Spec: networkingv1.IPAddressSpec{ParentRef: &networkingv1.ParentReference{Resource: "services", Namespace: s.Namespace, Name: s.Name}},
	}
}

func slicesPath(service int) string {
	return "/apis/discovery.k8s.io/v1/namespaces/" + namespaceOf(service) + "/endpointslices"
}

// endpointSlices are those of a Service. The first endpoint of all is the one that
// changes; then come the pods that there are, and others that nobody has made.
func endpointSlices(i, endpoints int, pods []int) []*discoveryv1.EndpointSlice {
	var out []*discoveryv1.EndpointSlice
	name, port, ready := "http", int32(8080), true
	for n := range endpoints {
		if n%perSlice == 0 {
			out = append(out, &discoveryv1.EndpointSlice{
				TypeMeta: metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSlice"},
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
		last := out[len(out)-1]
		last.Endpoints = append(last.Endpoints, discoveryv1.Endpoint{
			Addresses: []string{address}, Conditions: discoveryv1.EndpointConditions{Ready: &ready}, Zone: &zone,
			TargetRef: &corev1.ObjectReference{Kind: "Pod", Namespace: namespaceOf(i), Name: target},
		})
	}
	return out
}

func sliceName(service, n int) string { return fmt.Sprintf("%s-%d", serviceName(service), n) }

// pod is that of a sidecar, or one more.
func pod(i, services int) *corev1.Pod {
	s := podService(i, services)
	container := func(name string, ports ...corev1.ContainerPort) corev1.Container {
		return corev1.Container{
			Name: name, Image: "registry.example/" + name + ":1.0", Ports: ports, ImagePullPolicy: corev1.PullIfNotPresent,
			TerminationMessagePath: corev1.TerminationMessagePathDefault, TerminationMessagePolicy: corev1.TerminationMessageReadFile,
		}
	}
	grace, controller := int64(30), true
	return &corev1.Pod{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: namespaceOf(s), Name: podName(i), Labels: map[string]string{"app": serviceName(s), "pod-template-hash": "5d8f7c9b6d"},
			Annotations:     map[string]string{"outrigger.dev/status": "injected"},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: serviceName(s) + "-5d8f7c9b6d", UID: "00000000-0000-4000-8000-000000000000", Controller: &controller}},
		},
		Spec: corev1.PodSpec{
			ServiceAccountName: "default", NodeName: fmt.Sprintf("node-%d", i%100), RestartPolicy: corev1.RestartPolicyAlways, DNSPolicy: corev1.DNSClusterFirst,
			SchedulerName: corev1.DefaultSchedulerName, TerminationGracePeriodSeconds: &grace, SecurityContext: &corev1.PodSecurityContext{},
			Containers: []corev1.Container{
				container("application", corev1.ContainerPort{ContainerPort: 8080, Protocol: corev1.ProtocolTCP}), container("outrigger-proxy"),
			},
		},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: podIP(i), PodIPs: []corev1.PodIP{{IP: podIP(i)}}, QOSClass: corev1.PodQOSBestEffort},
	}
}

// change moves one endpoint of a Service to the address that says which change it
// is.
func (a *api) change(ctx context.Context, service, n int) error {
	patch := fmt.Sprintf(`[{"op":"replace","path":"/endpoints/0/addresses/0","value":%q}]`, mark(n))
	return a.do(ctx, http.MethodPatch, slicesPath(service)+"/"+sliceName(service, 0), "application/json-patch+json", []byte(patch))
}

// wait waits until the API server has seen all that was put into etcd: the last of
// each kind.
func (a *api) wait(ctx context.Context, p plan, services int) error {
	last := services - 1
	slices := endpointSlices(last, p.endpoints/services, nil)
	for _, path := range []string{
		"/api/v1/namespaces/" + namespaceOf(last) + "/services/" + serviceName(last),
		slicesPath(last) + "/" + slices[len(slices)-1].Name,
		"/api/v1/namespaces/" + namespaceOf(podService(p.pods-1, services)) + "/pods/" + podName(p.pods-1),
	} {
		// From the cache that lists are answered from.
		for err := a.do(ctx, http.MethodGet, path+"?resourceVersion=0", jsonType, []byte(nil)); err != nil; err = a.do(ctx, http.MethodGet, path+"?resourceVersion=0", jsonType, []byte(nil)) {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			time.Sleep(100 * time.Millisecond)
		}
	}
	return nil
}

// kubeconfig writes what the control plane connects with.
func (a *api) kubeconfig(dir string) (string, error) {
	type m = map[string]any
	t := a.server.Config.TLSClientConfig
	path := filepath.Join(dir, "kubeconfig")
	text, err := json.Marshal(m{
		"apiVersion": "v1", "kind": "Config", "current-context": "bench",
		"clusters": []m{{"name": "bench", "cluster": m{"server": a.server.Config.Host, "certificate-authority-data": t.CAData}}},
		"users":    []m{{"name": "bench", "user": m{"client-certificate-data": t.CertData, "client-key-data": t.KeyData}}},
		"contexts": []m{{"name": "bench", "context": m{"cluster": "bench", "user": "bench"}}},
	})
	if err != nil {
		return "", fmt.Errorf("encode the kubeconfig: %w", err)
	}
	return path, os.WriteFile(path, text, 0o600)
}
