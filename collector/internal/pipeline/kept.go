package pipeline

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"time"

	"github.com/outrigger-mesh/outrigger/atomicfile"
)

// errDamaged is of a file that unseal does not take.
var errDamaged = errors.New("the file is damaged")

const sealVersion = "1"

// keptFile is a small file beside the checkpoint, of what is good to have after a
// restart and no reason to stop without: what cannot be read or written is told, and
// that is all. It is for one goroutine at a time.
type keptFile struct {
	path  string
	max   int64 // bytes
	what  string
	every time.Duration // between two saves, at least
	log   *slog.Logger

	next time.Time // of a save
	told time.Time
}

// load gives the document to decode. A file that is not taken is set aside, one for
// each kind, so that damage cannot fill the disk.
func (k *keptFile) load(decode func([]byte) error) {
	b, err := k.read()
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err == nil {
		err = decode(b)
	}
	if err == nil {
		return
	}
	aside := k.path + ".damaged"
	if !errors.Is(err, errDamaged) {
		aside = ""
	} else if renameErr := os.Rename(k.path, aside); renameErr != nil {
		aside, err = "", errors.Join(err, renameErr)
	}
	k.log.Error("cannot use the "+k.what+" of before; they begin anew", "file.path", k.path, "outrigger.set_aside", aside, "error.message", err.Error())
}

func (k *keptFile) read() ([]byte, error) {
	f, err := os.Open(k.path)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, k.max+1))
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	if int64(len(b)) > k.max {
		return nil, fmt.Errorf("%w: it has more than %d bytes", errDamaged, k.max)
	}
	return b, nil
}

// save writes what encode returns, if that is not nil and it is time for it. It
// reports whether encode was asked and its bytes are on the disk.
func (k *keptFile) save(now bool, encode func() ([]byte, error)) bool {
	begun := time.Now()
	if !now && begun.Before(k.next) {
		return false
	}
	b, err := encode()
	if err == nil && b == nil {
		return false // nothing changed
	}
	if err == nil && int64(len(b)) > k.max {
		err = fmt.Errorf("%d bytes are more than the %d that would be read", len(b), k.max)
	}
	if err == nil {
		err = atomicfile.Write(k.path, b, 0o600)
	}
	k.next = time.Now().Add(max(k.every, 10*time.Since(begun)))
	if err == nil {
		return true
	}
	if time.Since(k.told) >= time.Minute {
		k.told = time.Now()
		k.log.Error("cannot save the "+k.what+"; a restart would forget them; free space in dataDir", "file.path", k.path, "error.message", err.Error())
	}
	return false
}

// seal writes a document with a header that tells its kind, version, checksum and length.
func seal(magic string, document any) ([]byte, error) {
	var body bytes.Buffer
	e := json.NewEncoder(&body)
	e.SetEscapeHTML(false)
	if err := e.Encode(document); err != nil {
		return nil, err
	}
	return fmt.Appendf(nil, "%s\n%s", header(magic, body.Bytes()), body.Bytes()), nil
}

func header(magic string, body []byte) string {
	return fmt.Sprintf("%s %s %08x %d", magic, sealVersion, crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)), len(body))
}

// unseal reads what seal wrote; all else is errDamaged.
func unseal(magic string, b []byte, document any) error {
	head, body, ok := bytes.Cut(b, []byte{'\n'})
	if want := header(magic, body); !ok || string(head) != want {
		return fmt.Errorf("%w: its first line is %.80q; it should be %q", errDamaged, head, want)
	}
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(document); err != nil {
		return fmt.Errorf("%w: %w", errDamaged, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: there is more after its end", errDamaged)
	}
	return nil
}
