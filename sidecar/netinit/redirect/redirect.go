// Package redirect puts the rules of package rules into the kernel, reads them
// back and takes them out, with nftables or with iptables.
//
// It acts on the network namespace of the calling thread: who wants another one
// enters it and locks the goroutine to its thread. It writes no sysctl, so that
// a read-only /proc/sys is fine. It does not know what is captured, nor whether
// connections really arrive (package check). Command netinit and the CNI plugin
// call it. Two calls in one namespace at a time would only do the work twice.
package redirect

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"github.com/outrigger-mesh/outrigger/sidecar/netinit/rules"
)

// Backend is a way to put rules into the kernel.
type Backend string

// Backends. Auto takes NFTables where the kernel takes it, else IPTables where
// its programs are there.
const (
	Auto     Backend = "auto"
	NFTables Backend = "nftables"
	IPTables Backend = "iptables"
)

// UnmarshalText reads the value of --backend.
func (b *Backend) UnmarshalText(text []byte) error {
	switch v := Backend(text); v {
	case Auto, NFTables, IPTables:
		*b = v
		return nil
	}
	return fmt.Errorf("%q: write auto, nftables or iptables", text)
}

// MarshalText is the value of --backend.
func (b Backend) MarshalText() ([]byte, error) { return []byte(b), nil }

// What rules fail of. An error that is neither is one that was not foreseen.
var (
	// ErrNotPermitted: this process may not set rules here.
	ErrNotPermitted = errors.New("not permitted")
	// ErrUnsupported: the kernel or the image lacks what the backend needs.
	ErrUnsupported = errors.New("not supported")
	// ErrMissing: the rules are not there, or others are.
	ErrMissing = errors.New("the rules are not in place")
)

const (
	remedyPermission = "give the init container securityContext.capabilities.add [NET_ADMIN] and runAsUser 0, or install the CNI plugin (outrigger-cni), with which pods need no privilege"
	remedyNFTables   = "use --backend iptables with an image that has iptables, or a kernel with CONFIG_NF_TABLES and CONFIG_NFT_REDIR (modules nf_tables, nft_chain_nat, nft_redir), loaded on the node"
	remedyIPTables   = "use --backend nftables, which needs no program, or an image that has iptables"
)

// Result says what was done.
type Result struct {
	Backend Backend
	// Program of IPTables, for example iptables-nft-restore.
	Program string
	// IPv6 is captured too.
	IPv6 bool
}

// Apply makes the rules of c the only ones of ours, whichever were there before
// and whichever backend had set them. Each IP version changes at once or not at
// all; with NFTables both change at once. Connections that exist keep what they
// have. IPv6 is left out where the namespace has none.
func Apply(ctx context.Context, c rules.Config, b Backend, log *slog.Logger) (Result, error) {
	if err := c.Validate(); err != nil {
		return Result{}, err
	}
	if err := permitted(); err != nil {
		return Result{}, err
	}
	v6, err := prepare(log)
	if err != nil {
		return Result{}, err
	}
	apply := func(b Backend) (Result, error) {
		res, err := set(ctx, c, b, v6 != noIPv6)
		if err != nil && v6 == linkLocalIPv6 && !errors.Is(err, ErrNotPermitted) {
			// Nobody outside of the link can be called by IPv6, and many kernels
			// without its NAT have such addresses.
			log.Warn("IPv6 is not captured: the pod has link-local addresses only and the rules for them were refused", "error.message", err.Error())
			res, err = set(ctx, c, b, false)
		}
		return res, err
	}
	if b != Auto {
		res, err := apply(b)
		if err == nil {
			removeOthers(ctx, res.Backend, log)
		}
		return res, err
	}
	res, nftErr := apply(NFTables)
	if nftErr == nil {
		removeOthers(ctx, NFTables, log)
		return res, nil
	}
	if !errors.Is(nftErr, ErrUnsupported) {
		return res, nftErr
	}
	log.Info("the kernel does not take nftables, trying iptables", "error.message", nftErr.Error())
	res, err = apply(IPTables)
	if err != nil {
		return res, fmt.Errorf("neither backend can set rules here: %w; %w; or install the CNI plugin (outrigger-cni), which sets them from the node", nftErr, err)
	}
	removeOthers(ctx, IPTables, log)
	return res, nil
}

func set(ctx context.Context, c rules.Config, b Backend, ipv6 bool) (Result, error) {
	families := []rules.Rules{rules.Make(c, false)}
	if ipv6 {
		families = append(families, rules.Make(c, true))
	}
	res := Result{Backend: b, IPv6: ipv6}
	if b == NFTables {
		return res, applyNFTables(families)
	}
	t, err := findIPTables(ctx)
	if err != nil {
		return res, err
	}
	res.Program = t.program(false, "restore")
	return res, t.apply(ctx, families)
}

// removeOthers takes out what another backend had set before: its rules would
// come first, or come again once the new ones are cleaned.
func removeOthers(ctx context.Context, used Backend, log *slog.Logger) {
	var err error
	if used == NFTables {
		err = cleanIPTables(ctx)
	} else {
		err = cleanNFTables()
	}
	if err != nil && !errors.Is(err, ErrUnsupported) {
		log.Warn("rules of another backend may remain", "error.message", err.Error())
	}
}

// Clean takes out all that Apply put in, by either backend. That nothing is
// there is no error.
func Clean(ctx context.Context) error {
	if err := permitted(); err != nil {
		return err
	}
	var errs []error
	for _, err := range []error{cleanNFTables(), cleanIPTables(ctx), removeDelivery()} {
		if err != nil && !errors.Is(err, ErrUnsupported) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Verify reads the rules back and compares them with those of c. The error is
// ErrMissing where they differ. It needs the permission that Apply needs.
func Verify(ctx context.Context, c rules.Config) (Result, error) {
	if err := permitted(); err != nil {
		return Result{}, err
	}
	v6, err := ipv6()
	if err != nil {
		return Result{}, err
	}
	families := []rules.Rules{rules.Make(c, false)}
	if v6 == globalIPv6 {
		families = append(families, rules.Make(c, true))
	}
	res := Result{Backend: NFTables, IPv6: len(families) > 1}
	nftErr := verifyNFTables(families)
	if nftErr == nil {
		return res, nil
	}
	t, err := findIPTables(ctx)
	if err == nil {
		res.Backend, res.Program = IPTables, t.program(false, "restore")
		if err = t.verify(ctx, families); err == nil {
			return res, nil
		}
	}
	return Result{}, fmt.Errorf("%w: %w; %w", ErrMissing, nftErr, err)
}

// diff says what is wrong with a list of rules, in one line.
func diff(where string, got, want []string) error {
	for i, w := range want {
		switch {
		case i >= len(got):
			return fmt.Errorf("%s has %d rules of %d: %q is missing", where, len(got), len(want), w)
		case got[i] != w:
			return fmt.Errorf("%s, rule %d is %q, not %q", where, i+1, got[i], w)
		}
	}
	if len(got) > len(want) {
		return fmt.Errorf("%s has %d rules, not %d: the first too many is %q", where, len(got), len(want), strings.TrimSpace(got[len(want)]))
	}
	return nil
}
