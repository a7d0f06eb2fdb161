package elasticsearch

import (
	"crypto/sha256"
	"encoding/base64"

	"github.com/outrigger-mesh/outrigger/collector/internal/output/jsontext"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// An _id is 16 characters for the file generation and 8 for the offset in it:
// unique, and ascending within a file, so that neighbours share their beginning,
// which is what the terms dictionary of Lucene compresses and looks up fastest.
const (
	fileIDBytes  = 12 // of the hash: 96 bits
	fileIDSize   = fileIDBytes / 3 * 4
	offsetDigits = 8 // of six bits: offsets below 256 TiB; longer ones have 11
)

// ascending are 64 characters in the order of their codes, none of which needs
// escaping.
const ascending = "-0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz"

type fileID [fileIDSize]byte

// newFileID names a file generation among those of all clusters and nodes that
// write to one index.
func newFileID(cluster, node, file string) (id fileID) {
	h := sha256.New()
	for _, s := range [...]string{cluster, node, file} {
		_, _ = h.Write([]byte(s)) // a hash never fails
		_, _ = h.Write([]byte{0})
	}
	base64.RawURLEncoding.Encode(id[:], h.Sum(nil)[:fileIDBytes])
	return id
}

func appendOffset(b []byte, offset int64) []byte {
	digits := offsetDigits
	if uint64(offset) >= 1<<(6*offsetDigits) {
		digits = 11
	}
	for shift := 6 * (digits - 1); shift >= 0; shift -= 6 {
		b = append(b, ascending[uint64(offset)>>shift&63])
	}
	return b
}

// place is what the records of one file generation share.
type place struct {
	id   shared // ,"_id":"... to the file's part of it
	path shared // ,"log.file.path":"...","log.offset":
}

type placeKey struct{ file, path, cluster, node string }

func newPlace(k placeKey) *place {
	id := newFileID(k.cluster, k.node, k.file)
	p := &place{id: shared{text: append([]byte(`,"_id":"`), id[:]...)}}
	if k.path != "" {
		p.path.text = jsontext.AppendString([]byte(`,"`+record.FilePath+`":`), k.path)
		p.path.text = append(p.path.text, `,"`+record.FileOffset+`":`...)
	}
	return p
}
