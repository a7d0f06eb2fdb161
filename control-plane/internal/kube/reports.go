package kube

import (
	"context"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/translate"
)

// Reports are what proxies say of themselves.
type Reports struct{}

// totals are what all replicas know.
type totals struct{}

func (r *Reports) sum(context.Context) totals { return totals{} }

func (t totals) fill(w *wanted, k objectKey, of []translate.Status) {}
