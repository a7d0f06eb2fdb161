package mtls

import "context"

// Renew does what Run does when a renewal is due.
func Renew(ctx context.Context, i *Identity) error { return i.renew(ctx) }
