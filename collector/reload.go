package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/outrigger-mesh/outrigger/collector/internal/config"
)

// A configuration is applied by ending all parts in order and putting new ones
// together: what was read and not acknowledged is read again from the log files,
// which are the buffer, so no line is lost. It is checked whole before that, and where
// the new parts cannot be made (a port in use, a certificate that is not there) the
// old ones are made again.

// reloads are told of by metrics that outlive the parts.
type reloads struct {
	total  *prometheus.CounterVec
	failed prometheus.Gauge
}

func newReloads() *reloads {
	r := &reloads{
		total: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "outrigger_config_reloads_total", Help: "Changes of the configuration file, by result: applied, or refused (the one of before stays).",
		}, []string{"result"}),
		failed: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "outrigger_config_refused", Help: "1 while the configuration file holds something that was refused, so that an older configuration is in use.",
		}),
	}
	r.total.WithLabelValues("applied")
	r.total.WithLabelValues("refused")
	return r
}

func (r *reloads) note(log *slog.Logger, path string, err error) {
	if err == nil {
		r.failed.Set(0)
		r.total.WithLabelValues("applied").Inc()
		log.Info("the changed configuration is in use", "file.path", path)
		return
	}
	r.failed.Set(1)
	r.total.WithLabelValues("refused").Inc()
	log.Error("the changed configuration is refused; the one of before stays in use", "file.path", path, "error.message", err.Error())
}

// runAndReload runs the parts, and those that the changed file asks for, until
// ctx ends or one of them fails. text is what c was read from.
func runAndReload(ctx context.Context, s settings, c *config.Config, text []byte, p *parts, node string, r *reloads, log *slog.Logger) error {
	for {
		running, stop := context.WithCancel(ctx)
		changed := make(chan *config.Config, 1)
		watching := make(chan struct{})
		go func() {
			defer close(watching)
			if next := watch(running, s, &text, r, log); next != nil {
				changed <- next
				stop()
			}
		}()
		err := p.run(running)
		stop()
		<-watching
		err = errors.Join(err, p.close())
		var next *config.Config
		select {
		case next = <-changed:
		default:
		}
		if err != nil || ctx.Err() != nil || next == nil {
			return err
		}
		quotas := p.rules
		nodeNext, err := nodeName(next)
		if err == nil {
			if p, err = assemble(ctx, next, nodeNext, log, r, quotas); err == nil {
				c, node = next, nodeNext
				r.note(log, s.config, nil)
				continue
			}
			if err := p.close(); err != nil {
				return err
			}
		}
		r.note(log, s.config, err)
		if p, err = assemble(ctx, c, node, log, r, quotas); err != nil {
			return errors.Join(fmt.Errorf("neither the changed configuration nor the one of before can be used: %w", err), p.close())
		}
	}
}

// watch returns the next configuration that is right and other than text, or nil
// when ctx has ended. text is what was read last, right or not.
func watch(ctx context.Context, s settings, text *[]byte, r *reloads, log *slog.Logger) *config.Config {
	if s.reload <= 0 {
		return nil
	}
	ticker := time.NewTicker(s.reload)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		now, err := os.ReadFile(s.config)
		if err != nil || bytes.Equal(now, *text) {
			continue // it is being replaced, or nothing changed
		}
		*text = now
		next, err := parseConfig(now)
		if err != nil {
			r.note(log, s.config, err)
			continue
		}
		return next
	}
}
