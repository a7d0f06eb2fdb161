package main

import (
	"fmt"
	"io"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
)

func (c *cli) logs() *cobra.Command {
	logs := &cobra.Command{Use: "logs", Short: "Search, follow and audit the logs of the mesh"}
	logs.AddCommand(c.search(), c.tail(), c.audit())
	return logs
}

func (c *cli) search() *cobra.Command {
	var since, from, to, output string
	var limit int
	cmd := &cobra.Command{
		Use:   "search [QUERY]",
		Short: "Search the logs, newest last",
		Long: `Search the logs, newest last. The query reads like Kibana's:

  service.name:payments AND "declined"
  http.response.status_code>=500 AND NOT service.name:storefront
  outrigger.response_flags:UO
  trace.id:4bf92f3577b34da6a3ce929d0e0e4736`,
		Example: `  outrigger logs search 'service.name:payments AND "declined"' --since 10m`,
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			q := url.Values{"limit": {strconv.Itoa(limit)}}
			set(q, "query", first(args))
			set(q, "from", from)
			set(q, "to", to)
			if from == "" {
				set(q, "since", since)
			}
			var lines []string // the newest come first; people read downwards
			err := c.records(cmd.Context(), "/api/v1/logs", q, func(line []byte, fields map[string]any) error {
				lines = append(lines, render(output, line, fields))
				return nil
			})
			if err != nil {
				return err
			}
			for _, l := range slices.Backward(lines) {
				fmt.Fprintln(c.stdout, l)
			}
			if len(lines) == 0 && output != "json" {
				fmt.Fprintf(cmd.ErrOrStderr(), "no record matches within %s: widen --since, or search without a query to see what there is\n", since)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&since, "since", "1h", "how far back, as 10m or 24h")
	cmd.Flags().StringVar(&from, "from", "", "begin, RFC 3339; instead of --since")
	cmd.Flags().StringVar(&to, "to", "", "end, RFC 3339")
	cmd.Flags().IntVar(&limit, "limit", 100, "how many records at most, 1 to 10000")
	cmd.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	return cmd
}

func (c *cli) tail() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "tail [QUERY]",
		Short: "Follow the logs as they come, until interrupted",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			q := url.Values{"follow": {"true"}}
			set(q, "query", first(args))
			return c.records(cmd.Context(), "/api/v1/logs", q, func(line []byte, fields map[string]any) error {
				_, err := fmt.Fprintln(c.stdout, render(output, line, fields))
				return err
			})
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	return cmd
}

func (c *cli) audit() *cobra.Command {
	return &cobra.Command{
		Use:   "audit",
		Short: "Account for every line: written = acknowledged + dropped + pending, per file and output",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			body, err := c.get(cmd.Context(), "/api/v1/audit", nil)
			if err != nil {
				return err
			}
			defer func() { _ = body.Close() }() // the answer has been read or given up
			_, err = io.Copy(c.stdout, body)
			return err
		},
	}
}

func set(q url.Values, name, value string) {
	if value != "" {
		q.Set(name, value)
	}
}

func first(args []string) string {
	if len(args) == 0 {
		return ""
	}
	return args[0]
}

// render is one record as a line: time, service, level, message, and what joins
// it to others.
func render(output string, line []byte, f map[string]any) string {
	if output == "json" {
		return string(line)
	}
	var b strings.Builder
	stamp := text(f, "@timestamp")
	if len(stamp) > 23 {
		stamp = stamp[:23]
	}
	fmt.Fprintf(&b, "%s %-12s %-5s %s", stamp, text(f, "service.name"), text(f, "log.level"), text(f, "message"))
	if d := text(f, "outrigger.direction"); d != "" {
		fmt.Fprintf(&b, " [%s %s]", d, text(f, "outrigger.destination"))
	}
	if id := text(f, "trace.id"); id != "" {
		fmt.Fprintf(&b, " trace.id=%s", id)
	}
	return b.String()
}

func text(f map[string]any, name string) string {
	switch v := f[name].(type) {
	case nil:
		return ""
	case string:
		return v
	case float64:
		return strconv.FormatFloat(v, 'f', -1, 64)
	default:
		return fmt.Sprint(v)
	}
}
