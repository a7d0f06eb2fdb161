package authority

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/outrigger-mesh/outrigger/atomicfile"
	"github.com/outrigger-mesh/outrigger/control-plane/identity/signing"
)

const (
	// rootTTL is how long a root that is made here lasts.
	rootTTL = 10 * 365 * 24 * time.Hour
	// tokenKeySize in bytes.
	tokenKeySize = 32
	// othersMay are the bits of a key's mode that must not be set. The group may
	// read, because a mounted Secret cannot do without.
	othersMay = 0o037
)

// Folder is a Store in a folder, which may be a mounted Secret and read only.
func Folder(dir string) Store { return folder(dir) }

type folder string

// String implements Store.
func (f folder) String() string { return "folder " + string(f) }

// Load implements Store.
func (f folder) Load(context.Context) (_ Files, err error) {
	d, err := os.Open(string(f))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrEmpty
	}
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	// Not between two steps of Replace. A file system without locks has none to
	// wait for: what does not fit together is read again later.
	_ = syscall.Flock(int(d.Fd()), syscall.LOCK_SH)
	return f.load()
}

func (f folder) load() (Files, error) {
	entries, err := os.ReadDir(string(f))
	if err != nil {
		return nil, err
	}
	if len(entries) == 0 {
		return nil, ErrEmpty
	}
	out := Files{}
	for _, name := range Names() {
		b, err := read(filepath.Join(string(f), name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		out[name] = b
	}
	return out, nil
}

// Create implements Store. It makes the folder under another name first, so that
// it is there whole or not at all.
func (f folder) Create(_ context.Context, files Files) (made bool, err error) {
	dir := string(f)
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return false, err
	}
	stage, err := os.MkdirTemp(filepath.Dir(dir), "."+filepath.Base(dir)+".new-*") // mode 0700
	if err != nil {
		return false, err
	}
	defer func() {
		if !made {
			err = errors.Join(err, os.RemoveAll(stage))
		}
	}()
	for name, text := range files {
		if err := write(filepath.Join(stage, name), text); err != nil {
			return false, err
		}
	}
	if err := atomicfile.SyncFolder(stage); err != nil {
		return false, err
	}
	// Over an empty folder, but never over one that is not.
	if err := syscall.Rename(stage, dir); err != nil {
		if again, rerr := os.ReadDir(dir); rerr == nil && len(again) > 0 {
			return false, nil // another program was faster
		}
		return false, fmt.Errorf("put it into its place: %w; name a folder that does not exist yet, inside one that is writable", err)
	}
	return true, atomicfile.SyncFolder(filepath.Dir(dir))
}

// Replace implements Store. Certificates are written before keys, so that where it
// is cut short each key still has its certificate.
func (f folder) Replace(_ context.Context, old, next Files) (err error) {
	d, err := os.Open(string(f))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if err := syscall.Flock(int(d.Fd()), syscall.LOCK_EX); err != nil {
		return fmt.Errorf("lock it: %w", err)
	}
	now, err := f.load()
	if err != nil {
		return err
	}
	if !maps.EqualFunc(now, old, bytes.Equal) {
		return ErrChanged
	}
	names := slices.SortedFunc(maps.Keys(next), func(a, b string) int {
		return cmp.Or(cmp.Compare(filepath.Ext(a), filepath.Ext(b)), cmp.Compare(a, b)) // .crt before .key
	})
	for _, name := range names {
		path := filepath.Join(string(f), name)
		if bytes.Equal(old[name], next[name]) {
			continue
		}
		if err := os.Remove(path + ".new"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := write(path+".new", next[name]); err != nil {
			return err
		}
		if err := os.Rename(path+".new", path); err != nil {
			return err
		}
	}
	for name := range old {
		if _, stays := next[name]; stays {
			continue
		}
		if err := os.Remove(filepath.Join(string(f), name)); err != nil {
			return err
		}
	}
	return d.Sync()
}

// newRoot makes the files of a new authority.
func newRoot(trustDomain string, now time.Time) (Files, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		Subject:   pkix.Name{CommonName: "Outrigger root of " + trustDomain + " " + now.UTC().Format("2006-01-02T15:04:05Z")},
		NotBefore: now.Add(-skew), NotAfter: now.Add(rootTTL),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	token := make([]byte, tokenKeySize)
	_, _ = rand.Read(token) // it never fails
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return Files{
		fileKey:  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}),
		fileCert: cert, fileRoots: cert,
		fileToken: []byte(base64.StdEncoding.EncodeToString(token) + "\n"),
	}, nil
}

func write(path string, text []byte) (err error) {
	mode := fs.FileMode(0o600)
	if strings.HasSuffix(strings.TrimSuffix(path, ".new"), ".crt") {
		mode = 0o644
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.Write(text); err != nil {
		return err
	}
	return f.Sync()
}

// decode checks that what the files hold fits together now.
func decode(content Files, now time.Time) (*keys, error) {
	k := &keys{pool: x509.NewCertPool()}
	sum := sha256.New()
	for _, name := range []string{fileKey, fileCert, fileRoots, fileToken} {
		b, ok := content[name]
		if !ok && name == fileToken {
			continue
		}
		if !ok {
			return nil, fmt.Errorf("%s is missing: put ca.key, ca.crt and root.crt there, or nothing at all", name)
		}
		if len(b) > MaxFile {
			return nil, fmt.Errorf("%s: %d bytes; at most %d", name, len(b), MaxFile)
		}
		_, _ = fmt.Fprintf(sum, "%s %d\n%s", name, len(b), b) // a hash never fails to write
	}
	sum.Sum(k.digest[:0])
	var err error
	if k.key, err = parseKey(content[fileKey]); err != nil {
		return nil, fmt.Errorf("%s: %w", fileKey, err)
	}
	certs, err := signing.DecodeCertificates(content[fileCert])
	if err != nil {
		return nil, fmt.Errorf("%s: %w", fileCert, err)
	}
	if k.roots, err = signing.DecodeCertificates(content[fileRoots]); err != nil {
		return nil, fmt.Errorf("%s: %w", fileRoots, err)
	}
	for _, r := range k.roots {
		if !r.IsCA {
			return nil, fmt.Errorf("%s: %q is no certificate of an authority", fileRoots, r.Subject)
		}
		k.pool.AddCert(r)
	}
	if text, ok := content[fileToken]; ok {
		if k.tokenKey, err = base64.StdEncoding.DecodeString(strings.TrimSpace(string(text))); err != nil || len(k.tokenKey) != tokenKeySize {
			return nil, fmt.Errorf("%s: it is not %d bytes in base64; write what openssl rand -base64 32 prints", fileToken, tokenKeySize)
		}
	}
	return k, k.link(certs, now)
}

// link chooses the issuer, the newest certificate of the key, and finds its way
// to a root.
func (k *keys) link(certs []*x509.Certificate, now time.Time) error {
	between := x509.NewCertPool()
	for _, c := range certs {
		between.AddCert(c)
		if !c.IsCA || c.KeyUsage&x509.KeyUsageCertSign == 0 || !samePublicKey(c.PublicKey, k.key.Public()) {
			continue
		}
		if k.issuer == nil || c.NotBefore.After(k.issuer.NotBefore) {
			k.issuer = c
		}
	}
	if k.issuer == nil {
		return errNoIssuer
	}
	chains, err := k.issuer.Verify(x509.VerifyOptions{Roots: k.pool, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if err != nil {
		return fmt.Errorf("the certificate in %s does not lead to one in %s: %w", fileCert, fileRoots, err)
	}
	for _, chain := range chains {
		until := slices.MinFunc(chain, func(a, b *x509.Certificate) int { return a.NotAfter.Compare(b.NotAfter) }).NotAfter
		if until.After(k.until) {
			k.until, k.chain = until, chain[:len(chain)-1]
		}
	}
	return nil
}

func read(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if strings.HasSuffix(path, ".key") && info.Mode().Perm()&othersMay != 0 {
		return nil, fmt.Errorf("%s has mode %04o, so that others could read or change the key: chmod 600 it, and make new keys if somebody may have read it", filepath.Base(path), info.Mode().Perm())
	}
	if info.Size() > MaxFile {
		return nil, fmt.Errorf("%s: %d bytes; at most %d", filepath.Base(path), info.Size(), MaxFile)
	}
	return os.ReadFile(path)
}

func parseKey(text []byte) (crypto.Signer, error) {
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, errors.New("it is not PEM")
	}
	var key any
	var err error
	switch block.Type {
	case "PRIVATE KEY":
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	default:
		return nil, fmt.Errorf("a PEM block %.40q is no private key that can be used: write it as PKCS #8, not encrypted", block.Type)
	}
	if err != nil {
		return nil, err
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("a key of type %T cannot sign", key)
	}
	return signer, nil
}
