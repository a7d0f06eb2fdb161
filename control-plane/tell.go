package main

import (
	"context"

	"google.golang.org/grpc"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/authority"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/discovery"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/kube"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/rebuild"
)

// teller tells a cluster what has become of its objects. The zero value tells
// nobody: a folder has no status.
type teller struct {
	reports *kube.Reports
	status  *kube.Status
}

// teller must be called before the loop runs; cluster may be nil.
func (s settings) teller(cluster *kube.Cluster, loop *rebuild.Loop, server *discovery.Server) teller {
	if cluster == nil {
		return teller{}
	}
	t := teller{reports: cluster.CollectReports(kube.ReportsOptions{
		Pod: s.podName, TrustDomain: s.trustDomain, State: loop.State, Progress: server.Progress, Nodes: server.Nodes,
	})}
	t.status = cluster.WriteStatus(kube.StatusOptions{Pod: s.podName, State: loop.State, Reports: t.reports})
	loop.OnBuild(t.status.Changed)
	return t
}

// register adds what is served over TLS beside xDS.
func (t teller) register(issuer *authority.Authority) func(grpc.ServiceRegistrar) {
	return func(to grpc.ServiceRegistrar) {
		issuer.Register(to)
		if t.reports != nil {
			t.reports.Register(to)
		}
	}
}

// parts run until their contexts end.
func (t teller) parts() []func(context.Context) error {
	if t.status == nil {
		return nil
	}
	return []func(context.Context) error{t.reports.Run, t.status.Run}
}
