// Package redirecttest redirects the traffic of a network namespace as netinit
// does, for tests of what the redirected connections come to.
//
// It is for tests, as root in a namespace that they have made; it knows one set of
// rules without exclusions. What netinit itself does is tested beside it.
package redirecttest

import (
	"encoding/binary"
	"net"
	"net/netip"
	"syscall"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// Set makes the rules for IPv4 and IPv6, where the proxy's user is uid.
func Set(uid int) error {
	nft, err := nftables.New()
	if err != nil {
		return err
	}
	family := func(f nftables.TableFamily, source, loopback netip.Prefix, from, to, size uint32) {
		table := nft.AddTable(&nftables.Table{Family: f, Name: "outrigger"})
		chain := func(name string, hook *nftables.ChainHook) *nftables.Chain {
			return nft.AddChain(&nftables.Chain{Table: table, Name: name, Type: nftables.ChainTypeNAT, Hooknum: hook, Priority: nftables.ChainPriorityNATDest})
		}
		meta := func(key expr.MetaKey, want []byte) []expr.Any {
			return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: want}}
		}
		address := func(offset uint32, op expr.CmpOp, p netip.Prefix) []expr.Any {
			mask := net.CIDRMask(p.Bits(), int(size)*8)
			return []expr.Any{
				&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size},
				&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: size, Mask: mask, Xor: make([]byte, size)},
				&expr.Cmp{Op: op, Register: 1, Data: p.Addr().AsSlice()},
			}
		}
		leave := []expr.Any{&expr.Verdict{Kind: expr.VerdictReturn}}
		redirectTo := func(port uint16) []expr.Any {
			return []expr.Any{&expr.Immediate{Register: 1, Data: binary.BigEndian.AppendUint16(nil, port)}, &expr.Redir{RegisterProtoMin: 1}}
		}
		tcp := meta(expr.MetaKeyL4PROTO, []byte{syscall.IPPROTO_TCP})
		lo := meta(expr.MetaKeyOIFNAME, append([]byte("lo"), make([]byte, 14)...))
		proxy := meta(expr.MetaKeySKUID, binary.NativeEndian.AppendUint32(nil, uint32(uid)))
		add := func(c *nftables.Chain, parts ...[]expr.Any) {
			var all []expr.Any
			for _, p := range parts {
				all = append(all, p...)
			}
			nft.AddRule(&nftables.Rule{Table: table, Chain: c, Exprs: all})
		}
		output := chain("output", nftables.ChainHookOutput)
		add(output, lo, address(from, expr.CmpOpEq, source), leave)
		add(output, tcp, lo, proxy, address(to, expr.CmpOpNeq, loopback), redirectTo(bootstrap.PortInbound))
		add(output, lo, leave)
		add(output, proxy, leave)
		add(output, address(to, expr.CmpOpEq, loopback), leave)
		add(output, tcp, redirectTo(bootstrap.PortOutbound))
		add(chain("prerouting", nftables.ChainHookPrerouting), tcp, redirectTo(bootstrap.PortInbound))
	}
	family(nftables.TableFamilyIPv4, netip.MustParsePrefix("127.0.0.6/32"), netip.MustParsePrefix("127.0.0.0/8"), 12, 16, 4)
	family(nftables.TableFamilyIPv6, netip.MustParsePrefix("::6/128"), netip.MustParsePrefix("::1/128"), 8, 24, 16)
	return nft.Flush()
}
