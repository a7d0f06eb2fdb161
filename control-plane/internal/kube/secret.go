package kube

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/authority"
)

// AuthoritySecret is the Secret of the authority's files, in the namespace of the
// control plane.
const AuthoritySecret = "outrigger-authority"

// ManagedBy is the label, and its value, of what the control plane writes.
const (
	ManagedBy      = "app.kubernetes.io/managed-by"
	ManagedByValue = "outrigger"
)

// Secret is an authority.Store in a Secret. What is in the Secret besides the
// authority's files is left alone.
type Secret struct {
	client client.Client
	name   types.NamespacedName
}

// Secret returns the store in AuthoritySecret.
func (c *Cluster) Secret() *Secret {
	return &Secret{client: c.client, name: types.NamespacedName{Namespace: c.o.Namespace, Name: AuthoritySecret}}
}

// String implements authority.Store.
func (s *Secret) String() string { return "Secret " + s.name.String() }

// Load implements authority.Store. It asks the API server, because what was true
// a moment ago is not enough where keys are made.
func (s *Secret) Load(ctx context.Context) (authority.Files, error) {
	_, files, err := s.get(ctx)
	return files, err
}

func (s *Secret) get(ctx context.Context) (*corev1.Secret, authority.Files, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	var o corev1.Secret
	if err := s.client.Get(ctx, s.name, &o); apierrors.IsNotFound(err) {
		return nil, nil, authority.ErrEmpty
	} else if err != nil {
		return nil, nil, s.explain(err)
	}
	files := authority.Files{}
	for _, name := range authority.Names() {
		if b, ok := o.Data[name]; ok {
			files[name] = b
		}
	}
	if len(files) == 0 {
		return &o, nil, authority.ErrEmpty // made by somebody for us to fill
	}
	return &o, files, nil
}

// Create implements authority.Store. The API server sees to it that one of several
// wins.
func (s *Secret) Create(ctx context.Context, files authority.Files) (made bool, err error) {
	o, _, err := s.get(ctx)
	switch {
	case err == nil:
		return false, nil // somebody was faster
	case !errors.Is(err, authority.ErrEmpty):
		return false, err
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	if o != nil {
		if o.Data == nil {
			o.Data = map[string][]byte{}
		}
		maps.Copy(o.Data, files)
		err = s.client.Update(ctx, o) // of this version only
	} else {
		err = s.client.Create(ctx, &corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{Namespace: s.name.Namespace, Name: s.name.Name, Labels: map[string]string{ManagedBy: ManagedByValue}},
			Type:       corev1.SecretTypeOpaque, Data: map[string][]byte(files),
		})
	}
	if apierrors.IsAlreadyExists(err) || apierrors.IsConflict(err) {
		return false, nil
	}
	if err != nil {
		return false, s.explain(err)
	}
	return true, nil
}

// Replace implements authority.Store.
func (s *Secret) Replace(ctx context.Context, old, next authority.Files) error {
	o, now, err := s.get(ctx)
	if err != nil {
		return err
	}
	if !maps.EqualFunc(now, old, bytes.Equal) {
		return authority.ErrChanged
	}
	for name := range old {
		delete(o.Data, name)
	}
	maps.Copy(o.Data, next)
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	if err := s.client.Update(ctx, o); apierrors.IsConflict(err) {
		return authority.ErrChanged
	} else if err != nil {
		return s.explain(err)
	}
	return nil
}

func (s *Secret) explain(err error) error {
	if refused(err) {
		return fmt.Errorf("%w; let the control plane's Role get, create and update Secrets in namespace %s", err, s.name.Namespace)
	}
	return err
}

// ServiceNames are the names under which a Service is reached from inside the
// cluster, for the certificate of what serves there.
func ServiceNames(service, namespace string) []string {
	short := service + "." + namespace
	return []string{short, short + ".svc", short + ".svc.cluster.local"}
}
