package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
)

// maxAudit bounds an account: some 100,000 files.
const maxAudit = 64 << 20

// sum is one side and the other of an account, in bytes of log files.
type sum struct {
	Written      int64            `json:"written"`
	Acknowledged int64            `json:"acknowledged"`
	Dropped      map[string]int64 `json:"dropped"`
	Pending      int64            `json:"pending"`

	Records        int64            `json:"records"`
	DroppedRecords map[string]int64 `json:"dropped_records"`
}

func (s sum) dropped() (n int64) {
	for _, v := range s.Dropped {
		n += v
	}
	return n
}

// off is by how much the account does not close.
func (s sum) off() int64 { return s.Written - s.Acknowledged - s.dropped() - s.Pending }

// causes is "rejected 120 in 2 records, too_long 7".
func (s sum) causes() string {
	var out []string
	for _, cause := range slices.Sorted(maps.Keys(s.Dropped)) {
		if n := s.Dropped[cause]; n != 0 {
			text := fmt.Sprintf("%s %d", clean(cause), n)
			if records := s.DroppedRecords[cause]; records > 0 {
				text += fmt.Sprintf(" in %d records", records)
			}
			out = append(out, text)
		}
	}
	return strings.Join(out, ", ")
}

func (s *sum) add(o sum) {
	s.Written += o.Written
	s.Acknowledged += o.Acknowledged
	s.Pending += o.Pending
	s.Records += o.Records
	sums(&s.Dropped, o.Dropped)
	sums(&s.DroppedRecords, o.DroppedRecords)
}

func sums(to *map[string]int64, from map[string]int64) {
	for cause, n := range from {
		if *to == nil {
			*to = map[string]int64{}
		}
		(*to)[cause] += n
	}
}

// account is what the collector says of one output.
type account struct {
	Output  string `json:"output"`
	Kind    string `json:"kind"`
	Breaker string `json:"breaker"`
	Total   sum    `json:"total"`
	Deleted sum    `json:"deleted"`
	Files   []struct {
		Path string `json:"path"`
		sum
	} `json:"files"`
	Rows []struct {
		Owner string    `json:"owner"`
		Hour  time.Time `json:"hour"`
		sum
	} `json:"rows"`
}

// off is by how much the account does not close: each file for itself, the
// total, and the total as the sum of its parts.
func (a account) off() int64 {
	off, parts := abs(a.Deleted.off()), a.Deleted
	parts.Dropped = maps.Clone(parts.Dropped)
	for _, f := range a.Files {
		off += abs(f.off())
		parts.add(f.sum)
	}
	if a.Rows != nil { // a collector that is older has none
		var rows sum
		for _, r := range a.Rows {
			off += abs(r.off())
			rows.add(r.sum)
		}
		off += abs(a.Total.Written-rows.Written) + abs(a.Total.Pending-rows.Pending) + abs(a.Total.dropped()-rows.dropped())
	}
	return max(off, abs(a.Total.off()), abs(a.Total.Written-parts.Written), abs(a.Total.Acknowledged-parts.Acknowledged),
		abs(a.Total.Pending-parts.Pending), abs(a.Total.dropped()-parts.dropped()))
}

// by adds the rows up by what the name says: namespace, pod or hour.
func (a account) by(what string) (names []string, sums map[string]*sum) {
	sums = map[string]*sum{}
	for _, r := range a.Rows {
		name := clean(r.Owner)
		switch {
		case what == "hour" && r.Hour.IsZero():
			name = "before"
		case what == "hour":
			name = r.Hour.UTC().Format("2006-01-02 15:00Z")
		case r.Owner == "":
			name = "(older)"
		case what == "namespace":
			name, _, _ = strings.Cut(name, "/")
		}
		if sums[name] == nil {
			sums[name] = &sum{}
		}
		sums[name].add(r.sum)
	}
	return slices.Sorted(maps.Keys(sums)), sums
}

// parts are what an account can be divided by.
var parts = []string{"file", "namespace", "pod", "hour"}

func abs(n int64) int64 { return max(n, -n) }

func (c *cli) audit() *cobra.Command {
	format := textFormat
	by := parts[0]
	cmd := &cobra.Command{
		Use:   "audit",
		Short: "Account for every line: written = acknowledged + dropped + pending, per file and output",
		Long: `Account for every byte of the log files, per file and output:

  written       the size of the file, as the file system gives it
  acknowledged  in records that the backend has confirmed
  dropped       counted with its cause: rejected (by the backend; see the dead letters),
                too_long, rotated_away (deleted before it could be read), truncated,
                unreadable, rule, quota, routed (to another output only)
  pending       not settled yet: not read, or not confirmed

Written has to be the sum of the others. The exit code is 1 if it is not.

By hour, written and acknowledged may fall into different hours, so that what is
pending in one can be less than nothing; over all hours it is what is pending.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !slices.Contains(parts, by) {
				return fmt.Errorf("--by %q is not known: write %s", by, strings.Join(parts, ", "))
			}
			body, err := c.get(cmd.Context(), "/api/v1/audit", nil)
			if err != nil {
				return err
			}
			defer func() { _ = body.Close() }() // the answer has been read or given up
			raw, err := io.ReadAll(io.LimitReader(body, maxAudit))
			if err != nil {
				return fmt.Errorf("the answer of the collector at %s broke off: %w", c.collector, err)
			}
			var answer struct {
				Outputs []account `json:"outputs"`
			}
			if err := json.Unmarshal(raw, &answer); err != nil {
				return fmt.Errorf("the collector at %s sent an account that cannot be read: %w", c.collector, err)
			}
			if format == jsonFormat {
				_, err = c.stdout.Write(raw)
			} else {
				err = printAudit(c.stdout, answer.Outputs, by)
			}
			var off []string
			for _, a := range answer.Outputs {
				if n := a.off(); n != 0 {
					off = append(off, fmt.Sprintf("%s by %d bytes", a.Output, n))
				}
			}
			if len(off) > 0 {
				err = errors.Join(err, fmt.Errorf("the account does not add up: %s; please report it with the output of outrigger logs audit -o json", strings.Join(off, ", ")))
			}
			return err
		},
	}
	cmd.Flags().VarP(&format, "output", "o", "text or json")
	cmd.Flags().StringVar(&by, "by", by, "what a line of the account is: "+strings.Join(parts, ", ")+" (the last 24 hours apart)")
	return cmd
}

func printAudit(w io.Writer, outputs []account, by string) error {
	if len(outputs) == 0 {
		_, err := fmt.Fprintln(w, "This collector follows no logs: its configuration has no logs section.")
		return err
	}
	var b strings.Builder
	for i, a := range outputs {
		if i > 0 {
			b.WriteByte('\n')
		}
		fmt.Fprintf(&b, "output %s (%s, breaker %s), in bytes\n", clean(a.Output), clean(a.Kind), clean(a.Breaker))
		t := table{{strings.ToUpper(by), "WRITTEN", "ACKNOWLEDGED", "DROPPED", "PENDING", "CAUSES"}}
		row := func(name string, s sum) {
			t = append(t, []string{name, fmt.Sprint(s.Written), fmt.Sprint(s.Acknowledged), fmt.Sprint(s.dropped()), fmt.Sprint(s.Pending), s.causes()})
		}
		if by == "file" {
			for _, f := range a.Files {
				row(fileName(f.Path), f.sum)
			}
			if a.Deleted.Written != 0 {
				row("deleted files", a.Deleted)
			}
		} else {
			names, sums := a.by(by)
			for _, name := range names {
				row(name, *sums[name])
			}
		}
		row("total", a.Total)
		t.print(&b)
		if n := a.off(); n != 0 {
			fmt.Fprintf(&b, "  DOES NOT ADD UP: by %d bytes\n", n)
		} else {
			b.WriteString("  adds up\n")
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// fileName is namespace/pod/container/file of a path that is laid out as kubelet
// does it, and else the path.
func fileName(path string) string {
	container := filepath.Dir(path)
	pod := strings.Split(filepath.Base(filepath.Dir(container)), "_")
	if len(pod) != 3 {
		return clean(path)
	}
	return clean(strings.Join([]string{pod[0], pod[1], filepath.Base(container), filepath.Base(path)}, "/"))
}

// table is rows of cells under one of headers. The first and the last column
// stand to the left, the others, which are numbers, to the right.
type table [][]string

func (t table) print(b *strings.Builder) {
	width := make([]int, len(t[0]))
	for _, row := range t {
		for i, cell := range row {
			width[i] = max(width[i], utf8.RuneCountInString(cell))
		}
	}
	for _, row := range t {
		var line strings.Builder
		for i, cell := range row {
			if pad := width[i]; i == 0 || i == len(row)-1 {
				fmt.Fprintf(&line, "  %-*s", pad, cell)
			} else {
				fmt.Fprintf(&line, "  %*s", pad, cell)
			}
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
}

// format is how a command writes what it found: the value of -o.
type format string

const (
	textFormat format = "text"
	jsonFormat format = "json"
)

// Set, String and Type are pflag.Value's.
func (f *format) Set(s string) error {
	v := format(s)
	if !slices.Contains([]format{textFormat, jsonFormat}, v) {
		return errors.New("write text or json")
	}
	*f = v
	return nil
}

func (f *format) String() string { return cmp.Or(string(*f), string(textFormat)) }

// Type is shown in the help.
func (*format) Type() string { return "format" }
