package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
)

func (c *cli) why() *cobra.Command {
	return &cobra.Command{
		Use:   "why ID",
		Short: "Explain a breaker's change of state, or one request, by its id",
		Long: `Explain by id:

  an evidence id (br-...)  why a breaker opened or closed: the arithmetic, and the
                           requests behind it
  a trace or request id    what became of one request: every hop, attempt and log
                           line that shares it`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if strings.HasPrefix(args[0], "br-") {
				return c.whyBreaker(cmd.Context(), args[0])
			}
			return c.whyRequest(cmd.Context(), args[0])
		},
	}
}

// evidence is a breaker's record, as the sidecar wrote it.
type evidence struct {
	At          time.Time `json:"@timestamp"`
	Service     string    `json:"service.name"`
	Instance    string    `json:"service.node.name"`
	ID          string    `json:"outrigger.evidence.id"`
	Policy      string    `json:"outrigger.breaker.policy"`
	Mode        string    `json:"outrigger.breaker.mode"`
	From        string    `json:"outrigger.breaker.from"`
	State       string    `json:"outrigger.breaker.state"`
	Reason      string    `json:"outrigger.breaker.reason"`
	Destination string    `json:"outrigger.destination"`
	Requests    []struct {
		At       time.Time `json:"@timestamp"`
		TraceID  string    `json:"trace.id"`
		Method   string    `json:"http.request.method"`
		Path     string    `json:"url.path"`
		Endpoint string    `json:"destination.address"`
		Status   int       `json:"http.response.status_code"`
		Flags    string    `json:"outrigger.response_flags"`
		Duration int64     `json:"event.duration"`
		Failure  bool      `json:"outrigger.failure"`
		Slow     bool      `json:"outrigger.slow"`
	} `json:"outrigger.evidence.requests"`
}

func (c *cli) whyBreaker(ctx context.Context, id string) error {
	body, err := c.get(ctx, "/api/v1/evidence/"+url.PathEscape(id), nil)
	if err != nil {
		return err
	}
	defer func() { _ = body.Close() }() // the answer has been read or given up
	var e evidence
	if err := json.NewDecoder(body).Decode(&e); err != nil {
		return fmt.Errorf("the record of %s cannot be read: %w", id, err)
	}
	would := ""
	if e.Mode == "Observe" {
		would = " (Observe mode: nothing was rejected)"
	}
	fmt.Fprintf(c.stdout, "Circuit breaker %s: %s -> %s%s\n", clean(e.Policy), clean(e.From), clean(strings.ToUpper(e.State)), would)
	fmt.Fprintf(c.stdout, "  when       %s\n", e.At.Format(time.RFC3339Nano))
	fmt.Fprintf(c.stdout, "  caller     %s (%s)\n", clean(e.Service), clean(e.Instance))
	fmt.Fprintf(c.stdout, "  called     %s\n", clean(e.Destination))
	fmt.Fprintf(c.stdout, "  because    %s\n", clean(e.Reason))
	if len(e.Requests) == 0 {
		return nil
	}
	fmt.Fprintf(c.stdout, "\nThe last %d requests before it (! counted against it):\n", len(e.Requests))
	w := tabwriter.NewWriter(c.stdout, 2, 0, 2, ' ', 0)
	fmt.Fprintln(w, "  \tTIME\tREQUEST\tENDPOINT\tSTATUS\tFLAGS\tTOOK\tTRACE")
	for _, r := range e.Requests {
		mark, status := " ", "-"
		if r.Failure || r.Slow {
			mark = "!"
		}
		if r.Status != 0 {
			status = fmt.Sprint(r.Status)
		}
		fmt.Fprintf(w, "  %s\t%s\t%s %s\t%s\t%s\t%s\t%s\t%s\n", mark, r.At.Format("15:04:05.000"), clean(r.Method), clean(r.Path), clean(r.Endpoint), status, clean(r.Flags),
			time.Duration(r.Duration).Round(10*time.Microsecond), clean(r.TraceID))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, r := range slices.Backward(e.Requests) {
		if r.TraceID != "" {
			fmt.Fprintf(c.stdout, "\nNext: outrigger why %s\n", clean(r.TraceID))
			break
		}
	}
	return nil
}

func (c *cli) whyRequest(ctx context.Context, id string) error {
	var found []map[string]any
	var widths columns
	var advice []string
	query := fmt.Sprintf("trace.id:%q OR http.request.id:%q", id, id)
	err := c.records(ctx, "/api/v1/logs", url.Values{"query": {query}, "limit": {"1000"}}, func(_ []byte, f map[string]any) error {
		widths.fit(f)
		found = append(found, f)
		if a := explain(f); a != "" && !slices.Contains(advice, a) {
			advice = append(advice, a)
		}
		return nil
	})
	if err != nil {
		var r *refusal
		if errors.As(err, &r) && r.status == http.StatusBadRequest {
			return fmt.Errorf("%q is no id: %w", id, err)
		}
		return err
	}
	if len(found) == 0 {
		return fmt.Errorf("no record that is kept has trace.id or http.request.id %s: is it whole, and does its node ship logs to this collector?", id)
	}
	fmt.Fprintf(c.stdout, "Request %s, %d records:\n\n", id, len(found))
	for _, f := range slices.Backward(found) {
		fmt.Fprintln(c.stdout, widths.render(f))
	}
	if len(advice) > 0 {
		fmt.Fprintln(c.stdout, "\nWhat the flags mean:")
		for _, a := range slices.Backward(advice) {
			fmt.Fprintln(c.stdout, "  "+clean(a))
		}
	}
	return nil
}

// flagMeanings are Envoy's response flags that the sidecar sets.
var flagMeanings = map[string]string{
	"DC": "the caller went away before the answer was complete", "DPE": "the caller's message was malformed and refused",
	"NC": "no such service is known", "NR": "no route matched", "OM": "the sidecar shed load",
	"UC": "the upstream closed the connection", "UF": "no connection to the upstream could be made", "UH": "there was no healthy endpoint",
	"UO": "a circuit breaker or limit rejected the call", "UPE": "the upstream's answer was malformed",
	"URX": "no further retry was allowed", "UT": "the timeout was over",
}

func explain(f map[string]any) string {
	flags := text(f, "outrigger.response_flags")
	if flags == "" || flags == "-" {
		return ""
	}
	var parts []string
	for flag := range strings.SplitSeq(flags, ",") {
		parts = append(parts, flag+": "+flagMeanings[flag])
	}
	s := text(f, "service.name") + " -> " + text(f, "outrigger.destination") + ": " + strings.Join(parts, "; ")
	if d := text(f, "error.message"); d != "" {
		s += " (" + d + ")"
	}
	return s
}
