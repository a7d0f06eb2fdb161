package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// ReportPrefix begins the name of the ConfigMap in which a replica tells the
// others what it knows; its pod's name follows. LabelReport marks it.
const (
	ReportPrefix = "outrigger-report-"
	LabelReport  = Prefix + "report"
	reportKey    = "report.json"
)

const (
	// tellEvery is how often a replica says what has changed, at most, and tellAgain
	// how often it says the same again, as a sign of life.
	tellEvery = 5 * time.Second
	tellAgain = 30 * time.Second
	// listenEvery is how often the leader reads what the others say, and staleAfter
	// how old that may be.
	listenEvery = 5 * time.Second
	staleAfter  = time.Minute
	// mostTold bounds a ConfigMap, in bytes; Kubernetes takes 1 MiB.
	mostTold = 900 << 10
	// mostReplicas are listened to.
	mostReplicas = 32
)

// other is what another replica has said.
type other struct {
	version string
	seen    time.Time // by our clock
	summary summary
}

func (r *Reports) configMap() types.NamespacedName {
	return types.NamespacedName{Namespace: r.c.o.Namespace, Name: ReportPrefix + r.o.Pod[:min(len(r.o.Pod), 253-len(ReportPrefix))]}
}

// tell writes the ConfigMap.
func (r *Reports) tell(ctx context.Context, s summary) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	name := r.configMap()
	o := &corev1.ConfigMap{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: kindConfigMap},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: name.Namespace, Name: name.Name, Labels: map[string]string{ManagedBy: ManagedByValue, LabelReport: "true"},
		},
		Data: map[string]string{reportKey: string(fit(s))},
	}
	// What is left behind goes with the pod.
	if pod, ok := r.c.source.Pod(types.NamespacedName{Namespace: name.Namespace, Name: r.o.Pod}); ok {
		o.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: kindPod, Name: pod.Name, UID: pod.UID}}
	}
	text, err := json.Marshal(o)
	if err == nil {
		err = r.c.client.Patch(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: name.Namespace, Name: name.Name}}, client.RawPatch(types.MergePatchType, text))
	}
	if apierrors.IsNotFound(err) {
		err = r.c.client.Create(ctx, o)
	}
	if err != nil {
		return fmt.Errorf("write ConfigMap %s: %w; let the control plane's Role create, get, list, patch and delete ConfigMaps in its namespace", name, err)
	}
	return nil
}

// withdraw takes back what was told, so that nobody counts it until it is stale.
func (r *Reports) withdraw(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout/5)
	defer cancel()
	name := r.configMap()
	err := r.c.client.Delete(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: name.Namespace, Name: name.Name}})
	if err != nil && !apierrors.IsNotFound(err) {
		r.c.log.Debug("a ConfigMap stays behind", "orchestrator.resource.name", name.Name, "error.message", err.Error())
	}
}

// fit encodes a summary so that it has room: first without words, then without the
// objects that come last.
func fit(s summary) []byte {
	text := marshal(s)
	if len(text) <= mostTold {
		return text
	}
	less := summary{Time: s.Time, Objects: map[string]counts{}, Truncated: true}
	for k, c := range s.Objects {
		c.Reasons, c.Changes = nil, nil
		less.Objects[k] = c
	}
	for text = marshal(less); len(text) > mostTold && len(less.Objects) > 0; text = marshal(less) {
		names := slices.Sorted(maps.Keys(less.Objects))
		for _, k := range names[len(names)*mostTold/(len(text)+mostTold/16):] {
			delete(less.Objects, k)
		}
	}
	return text
}

// fromOthers returns what the other replicas say that are alive.
func (r *Reports) fromOthers(ctx context.Context, now time.Time) []summary {
	r.pollMu.Lock()
	defer r.pollMu.Unlock()
	if now.Sub(r.polled) >= listenEvery {
		r.polled = now
		if err := r.poll(ctx, now); err != nil && ctx.Err() == nil {
			r.c.log.Debug("what the other replicas say cannot be read", "error.message", err.Error())
		}
	}
	var out []summary
	for _, name := range slices.Sorted(maps.Keys(r.others)) {
		if o := r.others[name]; now.Sub(o.seen) <= staleAfter {
			out = append(out, o.summary)
		}
	}
	return out
}

func (r *Reports) poll(ctx context.Context, now time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	var list corev1.ConfigMapList
	err := r.c.client.List(ctx, &list, client.InNamespace(r.c.o.Namespace), client.MatchingLabels{ManagedBy: ManagedByValue, LabelReport: "true"}, client.Limit(mostReplicas))
	if err != nil {
		return err
	}
	seen := map[string]other{}
	for i := range list.Items {
		m := &list.Items[i]
		if m.Name == r.configMap().Name {
			continue
		}
		o, known := r.others[m.Name]
		if known && o.version == m.ResourceVersion {
			seen[m.Name] = o
			continue
		}
		o = other{version: m.ResourceVersion, seen: now}
		if err := json.Unmarshal([]byte(m.Data[reportKey]), &o.summary); err != nil {
			r.c.log.Debug("what another replica says cannot be understood", "orchestrator.resource.name", m.Name, "error.message", err.Error())
			o.summary = summary{}
		}
		// Of one that is new to us nobody knows when it was written but itself.
		if !known && o.summary.Time.Before(now) {
			o.seen = o.summary.Time
		}
		seen[m.Name] = o
	}
	r.others = seen
	return nil
}

// share is n/m.
func share(n, m int32) string {
	return strconv.Itoa(int(n)) + "/" + strconv.Itoa(int(m))
}
