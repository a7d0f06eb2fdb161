package authority

import (
	"context"
	"errors"
)

// The files of an authority.
const (
	fileKey   = "ca.key"
	fileCert  = "ca.crt"
	fileRoots = "root.crt"
	fileToken = "token.key"
	// While a root is being exchanged, see Rotate.
	fileNextKey  = "next.key"
	fileNextCert = "next.crt"
	fileOldCert  = "old.crt"
	fileRotated  = "rotated"
)

// MaxFile bounds one of the files, in bytes.
const MaxFile = 256 << 10

// Names are those that a Store keeps; it leaves others alone.
func Names() []string {
	return []string{fileKey, fileCert, fileRoots, fileToken, fileNextKey, fileNextCert, fileOldCert, fileRotated}
}

// Files are the contents by name, which is one of Names.
type Files map[string][]byte

// Store is where the files are. Its methods must be safe for concurrent use,
// also by several programs at once, and its errors name no key.
type Store interface {
	// Load returns the files that are there, of which nobody changes anything. Its
	// error wraps ErrEmpty where there is none.
	Load(ctx context.Context) (Files, error)
	// Create saves files where there are none, all or nothing. It reports false, and
	// no error, where somebody else was faster.
	Create(ctx context.Context, files Files) (made bool, err error)
	// Replace puts next into the place of old, which Load returned. Its error wraps
	// ErrChanged where somebody has changed them since. A reader that loads
	// meanwhile sees files that fit together.
	Replace(ctx context.Context, old, next Files) error
	// String says where the files are, for people.
	String() string
}

// Errors of a Store.
var (
	ErrEmpty   = errors.New("it holds no files of an authority")
	ErrChanged = errors.New("somebody else has changed it meanwhile: look, and try again")
)
