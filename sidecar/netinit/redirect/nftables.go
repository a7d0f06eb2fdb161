package redirect

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"github.com/outrigger-mesh/outrigger/sidecar/netinit/rules"
)

// Table is the name of our tables, one of family ip and one of ip6: nat in
// family inet came only with Linux 5.2.
const Table = "outrigger"

// socketBuffer holds the batch and all the kernel answers to it, in bytes.
const socketBuffer = 8 << 20

func dialNFTables() (*nftables.Conn, error) {
	conn, err := nftables.New(nftables.AsLasting(), nftables.WithSockOptions(enlarge))
	switch {
	case err == nil:
		return conn, nil
	case errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES):
		return nil, fmt.Errorf("%w: opening a netlink socket was refused (%w), which a seccomp or AppArmor profile does: allow socket(AF_NETLINK) in the profile of the init container, for example seccompProfile RuntimeDefault, or install the CNI plugin (outrigger-cni)", ErrNotPermitted, err)
	}
	return nil, fmt.Errorf("%w: the kernel has no netfilter netlink (%w): %s", ErrUnsupported, err, remedyNFTables)
}

// enlarge is for long lists of exclusions. Where it is refused, short ones
// still fit.
func enlarge[C interface {
	SetReadBuffer(int) error
	SetWriteBuffer(int) error
}](conn C) error {
	_, _ = conn.SetReadBuffer(socketBuffer), conn.SetWriteBuffer(socketBuffer)
	return nil
}

func explainNFTables(what string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES):
		// The capability is there, so something else is in the way.
		return fmt.Errorf("%w: nftables: %s: %w, although NET_ADMIN is there: the network namespace belongs to another user namespace, or a seccomp, AppArmor or SELinux profile forbids it; %s", ErrNotPermitted, what, err, remedyPermission)
	case errors.Is(err, unix.EMSGSIZE) || errors.Is(err, unix.ENOBUFS):
		return fmt.Errorf("nftables: %s: %w: there are too many rules for the socket's buffer; exclude fewer ports and wider CIDRs", what, err)
	}
	for _, e := range []error{unix.ENOENT, unix.EOPNOTSUPP, unix.EINVAL, unix.EPROTONOSUPPORT, unix.EAFNOSUPPORT, unix.ENOSYS, unix.ENOPROTOOPT} {
		if errors.Is(err, e) {
			return fmt.Errorf("%w: nftables: %s: %w: the kernel does not take NAT rules of nftables; %s", ErrUnsupported, what, err, remedyNFTables)
		}
	}
	return fmt.Errorf("nftables: %s: %w", what, err)
}

func tableOf(ipv6 bool) *nftables.Table {
	if ipv6 {
		return &nftables.Table{Name: Table, Family: nftables.TableFamilyIPv6}
	}
	return &nftables.Table{Name: Table, Family: nftables.TableFamilyIPv4}
}

type nftChain struct {
	chain *nftables.Chain
	rules []rules.Rule
}

func chainsOf(t *nftables.Table, r rules.Rules) []nftChain {
	chain := func(name string, hook *nftables.ChainHook) *nftables.Chain {
		return &nftables.Chain{Name: name, Table: t, Type: nftables.ChainTypeNAT, Hooknum: hook, Priority: nftables.ChainPriorityNATDest}
	}
	return []nftChain{
		{chain("prerouting", nftables.ChainHookPrerouting), r.Prerouting},
		{chain("output", nftables.ChainHookOutput), r.Output},
	}
}

// applyNFTables replaces our tables in one batch. A family that is not named
// keeps its table: there is no traffic for it.
func applyNFTables(families []rules.Rules) (err error) {
	conn, err := dialNFTables()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, conn.CloseLasting()) }()
	for _, r := range families {
		t := tableOf(r.IPv6)
		conn.AddTable(t) // so that there is one to delete
		conn.DelTable(t)
		conn.AddTable(t)
		for _, c := range chainsOf(t, r) {
			conn.AddChain(c.chain)
			for _, rule := range c.rules {
				conn.AddRule(&nftables.Rule{
					Table: t, Chain: c.chain, Exprs: expressions(rule),
					UserData: userdata.AppendString(nil, userdata.TypeComment, rule.String()),
				})
			}
		}
	}
	return explainNFTables("set the rules", conn.Flush())
}

// Offsets into the IP and TCP headers (RFC 791, RFC 8200, RFC 9293).
const (
	source4, dest4 = 12, 16
	source6, dest6 = 8, 24
	tcpDest        = 2
)

// expressions are what the kernel runs for a rule; what is loaded into a
// register is compared at once, so that one register serves all.
func expressions(r rules.Rule) []expr.Any {
	const reg = unix.NFT_REG_1
	equals := func(data []byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: data} }
	out := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg},
		equals([]byte{unix.IPPROTO_TCP}),
	}
	if r.Loopback {
		name := make([]byte, unix.IFNAMSIZ)
		copy(name, "lo")
		out = append(out, &expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg}, equals(name))
	}
	address := func(p netip.Prefix, op expr.CmpOp, at4, at6 uint32) {
		if !p.IsValid() {
			return
		}
		at, size := at4, uint32(4)
		if p.Addr().Is6() {
			at, size = at6, 16
		}
		mask := make([]byte, size)
		for bit := range p.Bits() {
			mask[bit/8] |= 0x80 >> (bit % 8)
		}
		out = append(out,
			&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: at, Len: size},
			&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: size, Mask: mask, Xor: make([]byte, size)},
			&expr.Cmp{Op: op, Register: reg, Data: p.Masked().Addr().AsSlice()},
		)
	}
	address(r.Source, expr.CmpOpEq, source4, source6)
	address(r.Dest, expr.CmpOpEq, dest4, dest6)
	address(r.NotDest, expr.CmpOpNeq, dest4, dest6)
	if r.HasUID {
		out = append(out, &expr.Meta{Key: expr.MetaKeySKUID, Register: reg}, equals(binaryutil.NativeEndian.PutUint32(r.UID)))
	}
	if r.Port != 0 {
		out = append(out,
			&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: tcpDest, Len: 2},
			equals(binaryutil.BigEndian.PutUint16(r.Port)))
	}
	out = append(out, &expr.Counter{})
	if r.Redirect == 0 {
		return append(out, &expr.Verdict{Kind: expr.VerdictReturn})
	}
	return append(out,
		&expr.Immediate{Register: reg, Data: binaryutil.BigEndian.PutUint16(r.Redirect)},
		&expr.Redir{RegisterProtoMin: reg})
}

// cleanNFTables removes our tables. That there are none is no error.
func cleanNFTables() (err error) {
	conn, err := dialNFTables()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, conn.CloseLasting()) }()
	tables, err := conn.ListTables()
	if err != nil {
		return explainNFTables("list tables", err)
	}
	for _, t := range tables {
		if t.Name == Table && (t.Family == nftables.TableFamilyIPv4 || t.Family == nftables.TableFamilyIPv6) {
			conn.DelTable(t)
		}
	}
	return explainNFTables("remove our tables", conn.Flush())
}

// verifyNFTables compares by the comments that applyNFTables wrote: the kernel
// gives the expressions back in forms of its own.
func verifyNFTables(families []rules.Rules) (err error) {
	conn, err := dialNFTables()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, conn.CloseLasting()) }()
	for _, r := range families {
		t := tableOf(r.IPv6)
		family := "ip"
		if r.IPv6 {
			family = "ip6"
		}
		for _, c := range chainsOf(t, r) {
			where := fmt.Sprintf("nftables: table %s %s, chain %s", family, Table, c.chain.Name)
			got, err := conn.GetRules(t, c.chain)
			if err != nil {
				return fmt.Errorf("%s: %w", where, err)
			}
			var have, want []string
			for _, rule := range got {
				comment, _ := userdata.GetString(rule.UserData, userdata.TypeComment)
				have = append(have, comment)
			}
			for _, rule := range c.rules {
				want = append(want, rule.String())
			}
			if err := diff(where, have, want); err != nil {
				return err
			}
		}
	}
	return nil
}
