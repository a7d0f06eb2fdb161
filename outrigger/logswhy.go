package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// reason is why records of a container were not stored, as the collector says.
type reason struct {
	Output    string    `json:"output"`
	Namespace string    `json:"namespace"`
	Pod       string    `json:"pod"`
	Container string    `json:"container"`
	Cause     string    `json:"cause"`
	Rule      string    `json:"rule"`
	Records   int64     `json:"records"`
	Bytes     int64     `json:"bytes"`
	Last      time.Time `json:"last"`
	Samples   []string  `json:"samples"`
}

// causeMeanings say what a cause is, and what to do about it.
var causeMeanings = map[string]string{
	"rule":     "a rule or an annotation says that they are not to be sent",
	"quota":    "the namespace was over its quota",
	"routed":   "a rule sends them to other outputs only",
	"rejected": "the backend refused them for good; they are in the dead letters, and `outrigger logs replay` sends them again",
}

func (c *cli) logsWhy() *cobra.Command {
	format := textFormat
	var namespace string
	cmd := &cobra.Command{
		Use:   "why [POD]",
		Short: "Say which rule, quota or rejection took which lines, with samples",
		Long: `Say which rule, quota or rejection took which lines, with samples, and since when
that was noted: restarts of the collector do not forget it, a crash only its last seconds.
POD is the beginning of a pod's name; without it all are shown.
What was never read (rotated_away, truncated) is in outrigger logs audit --by pod.`,
		Example: "  outrigger logs why payments --namespace shop",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			body, err := c.get(cmd.Context(), "/api/v1/why", nil)
			if err != nil {
				return err
			}
			defer func() { _ = body.Close() }() // the answer has been read or given up
			var answer struct {
				Since   map[string]time.Time `json:"since"` // by output
				Reasons []reason             `json:"reasons"`
			}
			if err := json.NewDecoder(io.LimitReader(body, maxAudit)).Decode(&answer); err != nil {
				return fmt.Errorf("the collector at %s sent reasons that cannot be read: %w", c.collector, err)
			}
			shown := []reason{}
			for _, r := range answer.Reasons {
				if strings.HasPrefix(r.Pod, first(args)) && (namespace == "" || r.Namespace == namespace) {
					shown = append(shown, r)
				}
			}
			if format == jsonFormat {
				enc := json.NewEncoder(c.stdout)
				enc.SetIndent("", "  ")
				return enc.Encode(shown)
			}
			return printReasons(c.stdout, answer.Since, shown)
		},
	}
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "of this namespace only")
	cmd.Flags().VarP(&format, "output", "o", "text or json")
	return cmd
}

func printReasons(w io.Writer, since map[string]time.Time, reasons []reason) error {
	var b strings.Builder
	for _, output := range slices.Sorted(maps.Keys(since)) {
		fmt.Fprintf(&b, "Output %s, since %s:\n", clean(output), since[output].UTC().Format(time.RFC3339))
	}
	if len(reasons) == 0 {
		b.WriteString("No rule, quota or rejection has taken such a line.\n")
	}
	for _, r := range reasons {
		where := strings.Join([]string{r.Namespace, r.Pod, r.Container}, "/")
		if where == "//" {
			where = "(others)"
		}
		what := fmt.Sprintf("%d records, %d bytes", r.Records, r.Bytes)
		if r.Records == 0 {
			what = "not read at all"
		}
		fmt.Fprintf(&b, "%s, output %s: %s, cause %s", clean(where), clean(r.Output), what, clean(r.Cause))
		if r.Rule != "" {
			fmt.Fprintf(&b, ": %s", clean(r.Rule))
		}
		fmt.Fprintf(&b, "\n  %s; the last of %s\n", causeMeanings[r.Cause], r.Last.UTC().Format(time.RFC3339))
		for _, s := range r.Samples {
			fmt.Fprintf(&b, "  | %s\n", clean(s))
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}
