// Package pods asks the API server for one pod, which is all that the CNI
// plugin may ask it for.
//
// It knows the part of a kubeconfig that our installer writes and the part of a
// Pod that decides about redirection; client-go would be twenty times the plugin,
// which a node runs once for every pod. Package plugin calls it, and package
// install writes what it reads.
package pods

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"slices"
	"time"
)

const (
	// maxPod is more than etcd stores, in bytes.
	maxPod = 4 << 20
	// maxConfig of a kubeconfig, in bytes.
	maxConfig = 1 << 20
	// attempts with attemptTimeout each and pause between them; kubelet begins
	// again after that.
	attempts       = 3
	attemptTimeout = 5 * time.Second
	pause          = 300 * time.Millisecond
)

// Errors that are told apart.
var (
	// ErrNotFound says that there is no such pod.
	ErrNotFound = errors.New("the API server knows no such pod")
	// ErrUnauthorized says that the token is not or no longer valid.
	ErrUnauthorized = errors.New("the API server does not accept the plugin's token")
)

// Config is where the API server is and what proves who asks.
type Config struct {
	Server string // https://host:port
	CA     []byte // PEM
	Token  string
}

// kubeconfig is the form on disk: JSON, which is YAML too, so that kubectl
// --kubeconfig reads it.
type kubeconfig struct {
	APIVersion     string    `json:"apiVersion"`
	Kind           string    `json:"kind"`
	CurrentContext string    `json:"current-context"`
	Clusters       []cluster `json:"clusters"`
	Users          []user    `json:"users"`
	Contexts       []usage   `json:"contexts"`
}

type cluster struct {
	Name    string `json:"name"`
	Cluster struct {
		Server string `json:"server"`
		CA     []byte `json:"certificate-authority-data"`
	} `json:"cluster"`
}

type user struct {
	Name string `json:"name"`
	User struct {
		Token string `json:"token"`
	} `json:"user"`
}

type usage struct {
	Name    string `json:"name"`
	Context struct {
		Cluster string `json:"cluster"`
		User    string `json:"user"`
	} `json:"context"`
}

const name = "outrigger-cni"

// Encode is c as a kubeconfig.
func (c Config) Encode() ([]byte, error) {
	k := kubeconfig{APIVersion: "v1", Kind: "Config", CurrentContext: name, Clusters: make([]cluster, 1), Users: make([]user, 1), Contexts: make([]usage, 1)}
	k.Clusters[0].Name, k.Clusters[0].Cluster.Server, k.Clusters[0].Cluster.CA = name, c.Server, c.CA
	k.Users[0].Name, k.Users[0].User.Token = name, c.Token
	k.Contexts[0].Name, k.Contexts[0].Context.Cluster, k.Contexts[0].Context.User = name, name, name
	b, err := json.MarshalIndent(k, "", "  ")
	return append(b, '\n'), err
}

// Load reads what Encode wrote, and nothing else.
func Load(path string) (Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return Config{}, err
	}
	defer func() { _ = f.Close() }()
	d := json.NewDecoder(io.LimitReader(f, maxConfig))
	d.DisallowUnknownFields()
	var k kubeconfig
	if err := d.Decode(&k); err != nil {
		return Config{}, fmt.Errorf("%s: %w", path, err)
	}
	if len(k.Clusters) != 1 || len(k.Users) != 1 || k.Clusters[0].Cluster.Server == "" || k.Users[0].User.Token == "" {
		return Config{}, fmt.Errorf("%s does not name one cluster with a server and one user with a token", path)
	}
	return Config{Server: k.Clusters[0].Cluster.Server, CA: k.Clusters[0].Cluster.CA, Token: k.Users[0].User.Token}, nil
}

// Pod is what decides about redirection.
type Pod struct {
	UID         string
	Annotations map[string]string
	// Containers and init containers, by name.
	Containers []string
}

// Get asks for a pod, a few times where the API server is away or busy. What it
// returns is what the API server has at this moment, from no cache.
func Get(ctx context.Context, c Config, namespace, pod string) (Pod, error) {
	u, err := url.Parse(c.Server)
	if err != nil || u.Scheme != "https" || u.Host == "" {
		return Pod{}, fmt.Errorf("API server %q: write https://<host>:<port>", c.Server)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(c.CA) {
		return Pod{}, errors.New("the API server's certificate authority holds no certificate in PEM")
	}
	transport := &http.Transport{
		TLSClientConfig:   &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
		DisableKeepAlives: true, ForceAttemptHTTP2: false,
	}
	client := &http.Client{
		Transport: transport, Timeout: attemptTimeout,
		// A token is for the one that it was issued for.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	u = u.JoinPath("api/v1/namespaces", url.PathEscape(namespace), "pods", url.PathEscape(pod))
	for n := 1; ; n++ {
		p, again, err := get(ctx, client, u.String(), c.Token, namespace, pod)
		if err == nil || !again || n == attempts {
			return p, err
		}
		select {
		case <-ctx.Done():
			return Pod{}, errors.Join(err, ctx.Err())
		case <-time.After(pause):
		}
	}
}

// get is one attempt; again says whether another may help.
func get(ctx context.Context, client *http.Client, address, token, namespace, name string) (_ Pod, again bool, _ error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return Pod{}, false, err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "outrigger-cni")
	resp, err := client.Do(req)
	if err != nil {
		return Pod{}, true, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxPod+1))
	if err != nil {
		return Pod{}, true, err
	}
	switch {
	case resp.StatusCode == http.StatusOK && len(body) > maxPod:
		return Pod{}, false, fmt.Errorf("GET %s: more than %d bytes, which no pod has", address, maxPod)
	case resp.StatusCode == http.StatusOK:
		p, err := decode(body, namespace, name)
		return p, false, err
	case resp.StatusCode == http.StatusNotFound:
		return Pod{}, false, fmt.Errorf("GET %s: %w", address, ErrNotFound)
	case resp.StatusCode == http.StatusUnauthorized:
		return Pod{}, false, fmt.Errorf("GET %s: %w", address, ErrUnauthorized)
	}
	return Pod{}, resp.StatusCode >= 500 || resp.StatusCode == http.StatusTooManyRequests,
		fmt.Errorf("GET %s: %s: %.200s", address, resp.Status, bytes.TrimSpace(body))
}

// decode reads the parts that matter and insists that they are of the pod that
// was asked for: an answer that is something else must not read as "not meshed".
func decode(body []byte, namespace, name string) (Pod, error) {
	type named struct {
		Name string `json:"name"`
	}
	var o struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
		Metadata   struct {
			Name        string            `json:"name"`
			Namespace   string            `json:"namespace"`
			UID         string            `json:"uid"`
			Annotations map[string]string `json:"annotations"`
		} `json:"metadata"`
		Spec struct {
			Containers     []named `json:"containers"`
			InitContainers []named `json:"initContainers"`
		} `json:"spec"`
	}
	if err := json.Unmarshal(body, &o); err != nil {
		return Pod{}, fmt.Errorf("the API server's answer: %w", err)
	}
	m := o.Metadata
	if o.APIVersion != "v1" || o.Kind != "Pod" || m.Name != name || m.Namespace != namespace || m.UID == "" || len(o.Spec.Containers) == 0 {
		return Pod{}, fmt.Errorf("the API server's answer is %s %s %s/%s with %d containers, not the v1 Pod %s/%s", o.APIVersion, o.Kind, m.Namespace, m.Name, len(o.Spec.Containers), namespace, name)
	}
	p := Pod{UID: m.UID, Annotations: m.Annotations}
	for _, c := range slices.Concat(o.Spec.InitContainers, o.Spec.Containers) {
		p.Containers = append(p.Containers, c.Name)
	}
	return p, nil
}
