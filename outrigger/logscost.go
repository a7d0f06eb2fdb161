package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// costs is what the collector says that logs cost since a time.
type costs struct {
	Since time.Time `json:"since"`
	Until time.Time `json:"until"`
	Lines int64     `json:"lines"`
	Bytes int64     `json:"bytes"`
	Rows  []struct {
		Namespace    string  `json:"namespace"`
		Workload     string  `json:"workload"`
		Lines        int64   `json:"lines"`
		Bytes        int64   `json:"bytes"`
		Fields       int64   `json:"fields"`
		DroppedLines int64   `json:"droppedLines"`
		DroppedBytes int64   `json:"droppedBytes"`
		Share        float64 `json:"share"`
		Templates    []struct {
			Pattern   string  `json:"pattern"`
			Example   string  `json:"example"`
			Match     string  `json:"match"`
			Lines     int64   `json:"lines"`
			Bytes     int64   `json:"bytes"`
			Share     float64 `json:"share"`
			WouldSave int64   `json:"wouldSaveBytesPerDay"`
		} `json:"templates"`
	} `json:"rows"`
}

func (c *cli) logsCost() *cobra.Command {
	format := textFormat
	var namespace string
	templates := 3
	cmd := &cobra.Command{
		Use:   "cost",
		Short: "Say what the logs of each namespace and workload cost, and of which lines most are",
		Long: `Say what the logs of each namespace and workload cost since the collector started:
lines, bytes of the log files, fields, what rules dropped; and the templates that
most lines are made from, with what a rule that drops them would save a day.
Counts of templates are estimates. -o json has for each a regular expression for the
match.body of a rule.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			body, err := c.get(cmd.Context(), "/api/v1/cost", nil)
			if err != nil {
				return err
			}
			defer func() { _ = body.Close() }() // the answer has been read or given up
			raw, err := io.ReadAll(io.LimitReader(body, maxAudit))
			if err != nil {
				return fmt.Errorf("the answer of the collector at %s broke off: %w", c.collector, err)
			}
			if format == jsonFormat {
				_, err = c.stdout.Write(raw)
				return err
			}
			var answer costs
			if err := json.Unmarshal(raw, &answer); err != nil {
				return fmt.Errorf("the collector at %s sent costs that cannot be read: %w", c.collector, err)
			}
			return printCosts(c.stdout, answer, namespace, templates)
		},
	}
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "of this namespace only")
	cmd.Flags().IntVar(&templates, "templates", templates, "how many templates of each workload")
	cmd.Flags().VarP(&format, "output", "o", "text or json")
	return cmd
}

func printCosts(w io.Writer, a costs, namespace string, templates int) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%d lines, %s in %s\n", a.Lines, bytesOf(a.Bytes), a.Until.Sub(a.Since).Round(time.Second))
	t := table{{"WORKLOAD", "SHARE", "LINES", "BYTES", "FIELDS", "DROPPED", ""}}
	for _, r := range a.Rows {
		if namespace == "" || r.Namespace == namespace {
			t = append(t, []string{
				clean(r.Namespace + "/" + r.Workload), fmt.Sprintf("%.1f %%", 100*r.Share), fmt.Sprint(r.Lines), bytesOf(r.Bytes),
				fmt.Sprint(r.Fields), fmt.Sprintf("%d lines, %s", r.DroppedLines, bytesOf(r.DroppedBytes)), "",
			})
		}
	}
	t.print(&b)
	for _, r := range a.Rows {
		if namespace != "" && r.Namespace != namespace || len(r.Templates) == 0 || templates < 1 {
			continue
		}
		fmt.Fprintf(&b, "\n%s is mostly\n", clean(r.Namespace+"/"+r.Workload))
		for _, x := range r.Templates[:min(len(r.Templates), templates)] {
			fmt.Fprintf(&b, "  %4.1f %%  %s\n          dropping it would save %s a day; for example: %s\n", 100*x.Share, clean(x.Pattern), bytesOf(x.WouldSave), clean(x.Example))
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// bytesOf is 1.5 MiB.
func bytesOf(n int64) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	value, i := float64(n)/unit, 0
	for value >= unit && i < 3 {
		value, i = value/unit, i+1
	}
	return fmt.Sprintf("%.1f %ciB", value, "KMGT"[i])
}

func (c *cli) logsReplay() *cobra.Command {
	return &cobra.Command{
		Use:   "replay OUTPUT",
		Short: "Send the records again that an output's backend has rejected",
		Long: `Send the records again that an output's backend has rejected: after the cause has
been removed, which outrigger logs why names. They keep their ids, so that a backend
which knows records by them (Elasticsearch, the store) has none twice. What is rejected
again is a dead letter again.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			body, err := c.post(cmd.Context(), "/api/v1/replay", url.Values{"output": args})
			if err != nil {
				return err
			}
			defer func() { _ = body.Close() }() // the answer has been read or given up
			var answer struct {
				Bytes int64 `json:"bytes"`
			}
			if err := json.NewDecoder(io.LimitReader(body, maxAudit)).Decode(&answer); err != nil {
				return fmt.Errorf("the collector at %s sent an answer that cannot be read: %w", c.collector, err)
			}
			if answer.Bytes == 0 {
				_, err = fmt.Fprintf(c.stdout, "Output %s has no dead letters.\n", clean(args[0]))
				return err
			}
			_, err = fmt.Fprintf(c.stdout, "%s of dead letters are on their way again; outrigger logs audit shows them as pending until they are settled.\n", bytesOf(answer.Bytes))
			return err
		},
	}
}
