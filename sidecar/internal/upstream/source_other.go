//go:build !linux

package upstream

import (
	"context"
	"syscall"
)

func choosePortLate(context.Context, string, string, syscall.RawConn) error { return nil }
