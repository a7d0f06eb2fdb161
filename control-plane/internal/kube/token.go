package kube

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"

	"github.com/outrigger-mesh/outrigger/control-plane/identity"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/authority"
)

// Audience of the tokens that prove a pod to the mesh.
const Audience = "outrigger"

// What the API server says of whoever has a token that is bound to a pod.
const (
	extraPodName = "authentication.kubernetes.io/pod-name"
	extraPodUID  = "authentication.kubernetes.io/pod-uid"
	accountUser  = "system:serviceaccount:"
)

// TokenVerifier is an authority.Verifier of projected service account tokens. It
// asks the API server each time and remembers nothing. The API server itself
// remembers for 10 s that a token was good, so that whether its pod is still there
// is looked at here too.
type TokenVerifier struct {
	c           *Cluster
	trustDomain string
}

// TokenVerifier returns one for a trust domain.
func (c *Cluster) TokenVerifier(trustDomain string) *TokenVerifier {
	return &TokenVerifier{c, trustDomain}
}

func refuse(reason authority.Reason, format string, args ...any) error {
	return &authority.Refusal{Reason: reason, Err: fmt.Errorf(format, args...)}
}

// Verify implements authority.Verifier: the token is for Audience, of a service
// account, bound to a pod, and the pod is there, is still running and has this
// service account.
func (v *TokenVerifier) Verify(ctx context.Context, token string) (identity.Identity, error) {
	none := identity.Identity{}
	review := &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: []string{Audience}}}
	if err := v.c.client.Create(ctx, review); err != nil {
		if refused(err) {
			err = fmt.Errorf("%w; let the control plane's ClusterRole create tokenreviews", err)
		}
		return none, refuse(authority.NotPossible, "the API server did not verify the token: %w", err)
	}
	status := review.Status
	if !status.Authenticated {
		return none, refuse(authority.TokenRejected, "the API server does not accept the token for audience %s: %s; %s", Audience, orNothing(status.Error), claimsOf(token))
	}
	// An API server that knows no audiences names none.
	if !slices.Contains(status.Audiences, Audience) {
		return none, refuse(authority.TokenRejected, "the API server accepts the token, not for audience %s: mount a projected token with that audience", Audience)
	}
	account, ok := strings.CutPrefix(status.User.Username, accountUser)
	namespace, name, ok2 := strings.Cut(account, ":")
	if !ok || !ok2 {
		return none, refuse(authority.TokenUnbound, "the token is one of user %.253q: only a pod's service account gets a certificate", status.User.Username)
	}
	id, err := identity.Parse(identity.Identity{TrustDomain: v.trustDomain, Namespace: namespace, ServiceAccount: name}.SPIFFE())
	if err != nil {
		return none, refuse(authority.TokenUnbound, "the token: %w", err)
	}
	pod, uid := one(status.User.Extra[extraPodName]), types.UID(one(status.User.Extra[extraPodUID]))
	if pod == "" || uid == "" {
		return none, refuse(authority.TokenUnbound, "the token of service account %s/%s is bound to no pod: use the one that is mounted by a projected volume", namespace, name)
	}
	if err := v.podIs(ctx, types.NamespacedName{Namespace: namespace, Name: pod}, uid, name); err != nil {
		return none, err
	}
	return id, nil
}

// podIs compares with the pod, asking for it where what is known may be too old or
// too young.
func (v *TokenVerifier) podIs(ctx context.Context, name types.NamespacedName, uid types.UID, account string) error {
	pod, known := v.c.source.Pod(name)
	if !known || pod.UID != uid {
		pod = &corev1.Pod{}
		if err := v.c.client.Get(ctx, name, pod); apierrors.IsNotFound(err) {
			return refuse(authority.TokenUnbound, "the token is one of pod %s, which is gone", name)
		} else if err != nil {
			return refuse(authority.NotPossible, "the API server did not say whether pod %s is there: %w", name, err)
		}
	}
	switch {
	case pod.UID != uid:
		return refuse(authority.TokenUnbound, "the token is one of an earlier pod %s", name)
	case pod.Spec.ServiceAccountName != account:
		return refuse(authority.TokenUnbound, "the token is one of service account %s, and pod %s has %s", account, name, pod.Spec.ServiceAccountName)
	case pod.Status.Phase == corev1.PodSucceeded, pod.Status.Phase == corev1.PodFailed:
		return refuse(authority.TokenUnbound, "the token is one of pod %s, which has ended", name)
	}
	return nil
}

func one(v authenticationv1.ExtraValue) string {
	if len(v) != 1 {
		return ""
	}
	return v[0]
}

func orNothing(s string) string {
	if s == "" {
		return "it does not say why"
	}
	return s
}

// claimsOf says what a token states of itself, which nobody has verified, so that
// the one who reads a refusal finds the cause.
func claimsOf(token string) string {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return "it is not a service account token"
	}
	text, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return "it is not a service account token"
	}
	var c struct {
		Audience any    `json:"aud"` // one or several
		Issuer   string `json:"iss"`
		Expires  int64  `json:"exp"`
	}
	if err := json.Unmarshal(text, &c); err != nil {
		return "it is not a service account token"
	}
	out := fmt.Sprintf("it says that it is of issuer %.128q for audience %.128q", c.Issuer, fmt.Sprint(c.Audience))
	if c.Expires > 0 {
		out += " until " + time.Unix(c.Expires, 0).UTC().Format(time.RFC3339)
	}
	return out
}
