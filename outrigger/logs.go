package main

import (
	"bufio"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"

	"github.com/spf13/cobra"
)

func (c *cli) logs() *cobra.Command {
	logs := &cobra.Command{Use: "logs", Short: "Search, follow and audit the logs of the mesh"}
	logs.AddCommand(c.search(), c.tail(), c.audit(), c.logsWhy(), c.logsCost(), c.logsReplay())
	return logs
}

func (c *cli) search() *cobra.Command {
	var since, from, to string
	format := textFormat
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
			var found []hit // the newest come first; people read downwards
			var widths columns
			err := c.records(cmd.Context(), "/api/v1/logs", q, func(line []byte, fields map[string]any) error {
				widths.fit(fields)
				found = append(found, hit{string(line), fields})
				return nil
			})
			out := bufio.NewWriter(c.stdout)
			for _, h := range slices.Backward(found) {
				if format == jsonFormat {
					fmt.Fprintln(out, h.line)
				} else {
					fmt.Fprintln(out, widths.render(h.fields))
				}
			}
			// What was found before a search broke off is shown with the error.
			if err := errors.Join(err, out.Flush()); err != nil {
				return err
			}
			if len(found) == 0 && format == textFormat {
				within := "within " + since
				if from != "" {
					within = "since " + from
				}
				fmt.Fprintf(cmd.ErrOrStderr(), "no record matches %s: look further back, or search without a query to see what there is\n", within)
			}
			if len(found) == limit {
				fmt.Fprintf(cmd.ErrOrStderr(), "these are the newest %d; there may be more: raise --limit or narrow the query\n", limit)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&since, "since", "1h", "how far back, as 10m or 24h")
	cmd.Flags().StringVar(&from, "from", "", "begin, RFC 3339; instead of --since")
	cmd.Flags().StringVar(&to, "to", "", "end, RFC 3339")
	cmd.Flags().IntVar(&limit, "limit", 100, "how many records at most, 1 to 10000")
	cmd.Flags().VarP(&format, "output", "o", "text or json")
	return cmd
}

// hit is a record that was found.
type hit struct {
	line   string // as it came
	fields map[string]any
}

func (c *cli) tail() *cobra.Command {
	format := textFormat
	cmd := &cobra.Command{
		Use:   "tail [QUERY]",
		Short: "Follow the logs as they come, until interrupted",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			q := url.Values{"follow": {"true"}}
			set(q, "query", first(args))
			var widths columns
			return c.records(cmd.Context(), "/api/v1/logs", q, func(line []byte, fields map[string]any) error {
				if warning := text(fields, "warning"); warning != "" && len(fields) == 1 {
					fmt.Fprintln(cmd.ErrOrStderr(), "warning:", clean(warning))
					return nil
				}
				shown := string(line)
				if format == textFormat {
					shown = widths.render(fields)
				}
				_, err := fmt.Fprintln(c.stdout, shown)
				return err
			})
		},
	}
	cmd.Flags().VarP(&format, "output", "o", "text or json")
	return cmd
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
