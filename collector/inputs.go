package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/outrigger-mesh/outrigger/collector/internal/config"
	"github.com/outrigger-mesh/outrigger/collector/internal/input/events"
	"github.com/outrigger-mesh/outrigger/collector/internal/input/journal"
	"github.com/outrigger-mesh/outrigger/collector/internal/input/journald"
	"github.com/outrigger-mesh/outrigger/collector/internal/input/otlp"
	"github.com/outrigger-mesh/outrigger/collector/internal/tail"
	"github.com/outrigger-mesh/outrigger/collector/record"
	"github.com/outrigger-mesh/outrigger/program"
)

// What is pushed to the collector becomes a file first, which every output follows
// like the log of a container: one mechanism accounts for all.

// inputFolder is where the journal of an input is.
func inputFolder(c *config.Config, name string) string {
	return filepath.Join(c.DataDir, "inputs", name)
}

// journals are the files that the pipelines follow for the inputs.
func journals(c *config.Config) (files []tail.Files) {
	for _, name := range c.Logs.Inputs.Names() {
		decoder := &journal.Decoder{} // of one pipeline
		files = append(files, tail.Files{
			Patterns: []string{filepath.Join(inputFolder(c, name), "0.log")},
			Resource: record.Resource{Service: name}, Format: tail.Envelope, Decode: decoder.Decode, Own: true,
		})
	}
	return files
}

// inputs makes what writes the journals, after the pipelines, which know what is pending.
func (p *parts) inputs(ctx context.Context, c *config.Config, node string) error {
	in := c.Logs.Inputs
	if in.Events != nil && p.api == nil {
		return errors.New("logs.inputs.events needs kubernetes.watch: write it, or remove events")
	}
	writer := func(name string) (*journal.Writer, prometheus.Registerer, error) {
		folder := inputFolder(c, name)
		reg := prometheus.WrapRegistererWith(prometheus.Labels{"input": name}, p.registry)
		w, err := journal.Open(journal.Config{
			Folder: folder, Log: p.log, Registerer: reg,
			Pending: func() (most int64) {
				for _, pl := range p.pipelines {
					most = max(most, pl.PendingIn(folder))
				}
				return most
			},
		})
		if err != nil {
			return nil, nil, fmt.Errorf("logs.inputs.%s: %w", name, err)
		}
		p.closers = append(p.closers, w.Close)
		return w, reg, nil
	}
	if o := in.OTLP; o != nil {
		w, reg, err := writer("otlp")
		if err != nil {
			return err
		}
		r, err := otlp.New(otlp.Config{Journal: w, Cluster: c.Cluster, Node: node, Log: p.log, Registerer: reg})
		if err != nil {
			return fmt.Errorf("logs.inputs.otlp: %w", err)
		}
		l, err := p.bind(program.Listen(ctx, "logs.inputs.otlp.address:", o.Address))
		if err != nil {
			return err
		}
		p.runners = append(p.runners, func(ctx context.Context) error { return r.Serve(ctx, l) })
	}
	if e := in.Events; e != nil {
		w, reg, err := writer("events")
		if err != nil {
			return err
		}
		namespace, pod := podName()
		input, err := events.New(events.Config{
			API: p.api, Namespace: cmp.Or(e.Namespace, namespace), Identity: cmp.Or(pod, node),
			Cluster: c.Cluster, Journal: w, Log: p.log, Registerer: reg,
		})
		if err != nil {
			return fmt.Errorf("logs.inputs.events: %w", err)
		}
		p.runners = append(p.runners, input.Run)
	}
	if j := in.Journald; j != nil {
		w, reg, err := writer("journald")
		if err != nil {
			return err
		}
		input, err := journald.New(journald.Config{
			Binary: j.Binary, Directory: j.Directory, Namespace: j.Namespace, Units: j.Units, Since: j.Since,
			CursorFile: filepath.Join(inputFolder(c, "journald"), "cursor"), Cluster: c.Cluster, Node: node,
			Journal: w, Log: p.log, Registerer: reg,
		})
		if err != nil {
			return fmt.Errorf("logs.inputs.journald: %w", err)
		}
		p.runners = append(p.runners, input.Run)
	}
	return nil
}
