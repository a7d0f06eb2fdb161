//go:build !linux

package listener

import (
	"errors"
	"net/netip"
)

// OriginalDestination is known on Linux only.
func (c *Conn) OriginalDestination() (netip.AddrPort, error) {
	return netip.AddrPort{}, errors.New("connections are captured on Linux only")
}
