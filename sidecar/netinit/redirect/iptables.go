package redirect

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/netinit/rules"
)

const (
	// lockSeconds that iptables waits for others who change rules.
	lockSeconds = "5"
	// runTimeout of one program.
	runTimeout = 10 * time.Second
	// maxSaid of a program's complaint is passed on, in bytes.
	maxSaid = 1 << 10
)

// iptables is one variant: what its programs are called, with v4 and v6 in
// front and -save and -restore behind.
type iptables struct{ variant string }

// variants in the order in which they are tried: -nft and -legacy say what they
// are; the plain name is whichever the image was made for.
var variants = []iptables{{"-nft"}, {"-legacy"}, {""}}

func (t iptables) program(ipv6 bool, verb string) string {
	if ipv6 {
		return "ip6tables" + t.variant + "-" + verb
	}
	return "iptables" + t.variant + "-" + verb
}

// mayHaveRules is false where asking would only make the table: the programs of
// -legacy do so by listing it.
func (t iptables) mayHaveRules(ipv6 bool) bool {
	if _, err := exec.LookPath(t.program(ipv6, "restore")); err != nil {
		return false
	}
	if t.variant != "-legacy" {
		return true
	}
	names := "/proc/thread-self/net/ip_tables_names"
	if ipv6 {
		names = "/proc/thread-self/net/ip6_tables_names"
	}
	b, err := os.ReadFile(names)
	return err == nil && slices.Contains(strings.Fields(string(b)), "nat")
}

// findIPTables takes the variant that has rules in the table nat of the
// namespace, because both at once are hard to reason about, else the first one
// that works.
func findIPTables(ctx context.Context) (iptables, error) {
	for _, t := range variants {
		if !t.mayHaveRules(false) {
			continue
		}
		if saved, err := t.save(ctx, false); err == nil && strings.Contains(saved, "\n-A ") {
			return t, nil
		}
	}
	var said []string
	for _, t := range variants {
		_, err := exec.LookPath(t.program(false, "restore"))
		if err == nil {
			_, err = t.save(ctx, false)
		}
		if err == nil || errors.Is(err, ErrNotPermitted) {
			return t, err
		}
		said = append(said, err.Error())
	}
	return iptables{}, fmt.Errorf("%w: iptables: no program works here (%s): %s", ErrUnsupported, strings.Join(said, "; "), remedyIPTables)
}

func (t iptables) save(ctx context.Context, ipv6 bool) (string, error) {
	return run(ctx, "", t.program(ipv6, "save"), "-t", "nat")
}

// apply replaces our chains and sees to it that exactly one jump leads to each.
// The table changes at once; the two IP versions do so one after the other.
func (t iptables) apply(ctx context.Context, families []rules.Rules) error {
	for _, r := range families {
		saved, err := t.save(ctx, r.IPv6)
		if err != nil {
			return err
		}
		var b strings.Builder
		b.WriteString("*nat\n")
		for _, chain := range []string{rules.ChainPrerouting, rules.ChainOutput} {
			b.WriteString(":" + chain + " - [0:0]\n") // makes the chain, or empties it
		}
		for _, line := range r.IPTables() {
			b.WriteString(line + "\n")
		}
		for _, jump := range rules.Jumps {
			for range count(saved, "-A "+jump) {
				b.WriteString("-D " + jump + "\n")
			}
			chain, rest, _ := strings.Cut(jump, " ")
			b.WriteString("-I " + chain + " 1 " + rest + "\n")
		}
		b.WriteString("COMMIT\n")
		if err := t.restore(ctx, r.IPv6, b.String()); err != nil {
			return err
		}
	}
	return nil
}

func (t iptables) restore(ctx context.Context, ipv6 bool, text string) error {
	_, err := run(ctx, text, t.program(ipv6, "restore"), "--noflush", "-w", lockSeconds)
	return err
}

func count(saved, line string) int {
	n := 0
	for l := range strings.Lines(saved) {
		if strings.TrimSpace(l) == line {
			n++
		}
	}
	return n
}

// cleanIPTables removes our chains, whichever variant made them.
func cleanIPTables(ctx context.Context) error {
	var errs []error
	for _, t := range variants {
		for _, ipv6 := range []bool{false, true} {
			if !t.mayHaveRules(ipv6) {
				continue
			}
			saved, err := t.save(ctx, ipv6)
			if err != nil {
				continue // what cannot be listed has not been set either
			}
			if !strings.Contains(saved, "\n:"+rules.ChainOutput+" ") && !strings.Contains(saved, "\n:"+rules.ChainPrerouting+" ") {
				continue
			}
			var b strings.Builder
			b.WriteString("*nat\n")
			for _, chain := range []string{rules.ChainPrerouting, rules.ChainOutput} {
				b.WriteString(":" + chain + " - [0:0]\n")
			}
			for _, jump := range rules.Jumps {
				for range count(saved, "-A "+jump) {
					b.WriteString("-D " + jump + "\n")
				}
			}
			for _, chain := range []string{rules.ChainPrerouting, rules.ChainOutput} {
				b.WriteString("-X " + chain + "\n")
			}
			b.WriteString("COMMIT\n")
			errs = append(errs, t.restore(ctx, ipv6, b.String()))
		}
	}
	return errors.Join(errs...)
}

func (t iptables) verify(ctx context.Context, families []rules.Rules) error {
	for _, r := range families {
		saved, err := t.save(ctx, r.IPv6)
		if err != nil {
			return err
		}
		var have, want []string
		for line := range strings.Lines(saved) {
			line = strings.TrimSpace(line)
			if strings.HasPrefix(line, "-A OUTRIGGER_") {
				have = append(have, words(line))
			}
		}
		for _, line := range r.IPTables() {
			want = append(want, words(line))
		}
		slices.SortStableFunc(have, byChain)
		slices.SortStableFunc(want, byChain)
		if err := diff(t.program(r.IPv6, "save"), have, want); err != nil {
			return err
		}
		for _, jump := range rules.Jumps {
			if n := count(saved, "-A "+jump); n != 1 {
				return fmt.Errorf("%s: %q is there %d times, not once", t.program(r.IPv6, "save"), jump, n)
			}
		}
	}
	return nil
}

// words of a rule in an order that does not depend on the version of iptables,
// behind its chain.
func words(line string) string {
	w := strings.Fields(line)
	slices.Sort(w[2:])
	return strings.Join(w, " ")
}

// byChain: iptables prints chains in an order of its own.
func byChain(a, b string) int {
	chain := func(s string) string { return strings.Fields(s)[1] }
	return strings.Compare(chain(a), chain(b))
}

func run(ctx context.Context, stdin, program string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, runTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...) //nolint:gosec // the names are those of variants
	cmd.WaitDelay = time.Second
	var out, complaint bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &complaint
	err := cmd.Run()
	if err == nil {
		return out.String(), nil
	}
	said := strings.Join(strings.Fields(complaint.String()), " ")
	if len(said) > maxSaid {
		said = said[:maxSaid] + "..."
	}
	switch {
	case ctx.Err() != nil:
		return "", fmt.Errorf("%s did not end within %s: %s", program, runTimeout, said)
	case strings.Contains(said, "Permission denied") || strings.Contains(said, "you must be root"):
		return "", fmt.Errorf("%w: %s: %w: %s; it needs the capability NET_RAW beside NET_ADMIN where it is iptables-legacy; %s", ErrNotPermitted, program, err, said, remedyPermission)
	case strings.Contains(said, "xtables lock"):
		return "", fmt.Errorf("%s: %w: %s: somebody else changes rules in this namespace; run this again", program, err, said)
	}
	return "", fmt.Errorf("%w: %s: %w: %s", ErrUnsupported, program, err, said)
}
