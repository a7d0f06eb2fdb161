package http2

import (
	"hash/maphash"
	"math/bits"
)

// encoder compresses field sections (RFC 7541) with less work than there is
// bandwidth to save inside a mesh: strings are not Huffman coded, and a field
// enters the dynamic table only when it is seen for the second time, so that
// values that never come again (trace and request identifiers) push nothing
// out. Fields that carry secrets never enter it (section 7.1.3).
//
// Its table is bounded by what the peer allows and by 4096 bytes.
type encoder struct {
	max     uint32 // table size in use
	least   uint32 // the least it was since the last section
	changed bool

	ix   *encoderIndex // nil until the first field
	size uint32
}

type encoderIndex struct {
	seed maphash.Seed
	// ents is a ring of the entries with the numbers first to next-1. Its length
	// is a power of two.
	ents        []entry
	first, next uint32
	// byField and byName hold the newest entry's number plus 1 for a hash.
	byField, byName [slots]uint32
	// seen holds the hashes of fields that came lately.
	seen [slots]uint32
}

// slots is as many as there can be entries.
const slots = tableSize / 32

type entry struct {
	name, value string
}

// at is the entry with a number.
func (x *encoderIndex) at(n uint32) *entry { return &x.ents[n&uint32(len(x.ents)-1)] }

func (e *entry) size() uint32 { return uint32(len(e.name) + len(e.value) + 32) }

func newEncoder() encoder { return encoder{max: tableSize, least: tableSize} }

// setMax takes the peer's SETTINGS_HEADER_TABLE_SIZE.
func (e *encoder) setMax(n uint32) {
	n = min(n, tableSize)
	if n == e.max {
		return
	}
	e.max, e.changed = n, true
	e.least = min(e.least, n)
	e.evict()
}

func (e *encoder) evict() {
	for e.size > e.max {
		ent := e.ix.at(e.ix.first)
		e.size -= ent.size()
		*ent = entry{}
		e.ix.first++
	}
}

// begin appends what must stand before the first field of a section.
func (e *encoder) begin(dst []byte) []byte {
	if !e.changed {
		return dst
	}
	if e.least < e.max {
		dst = appendVarInt(dst, 0x20, 5, uint64(e.least))
	}
	dst = appendVarInt(dst, 0x20, 5, uint64(e.max))
	e.changed, e.least = false, e.max
	return dst
}

// field appends a field. The name is in lower case; nothing is kept.
func (e *encoder) field(dst, name, value []byte) []byte {
	x := e.ix
	if x == nil {
		x = &encoderIndex{seed: maphash.MakeSeed()}
		e.ix = x
	}
	nh := maphash.Bytes(x.seed, name)
	h := bits.RotateLeft64(nh, 17) ^ maphash.Bytes(x.seed, value)
	slot, tag := h%slots, uint32(h>>32)|1
	if n := x.byField[slot]; n > x.first {
		ent := x.at(n - 1)
		if ent.value == string(value) && ent.name == string(name) {
			return appendVarInt(dst, 0x80, 7, uint64(x.next-n)+staticLen+1)
		}
	}
	pattern, prefix := byte(0), 4
	add := false
	switch {
	case secret(name, value):
		pattern = 0x10
	case x.seen[slot] == tag:
		if size := uint32(len(name)+len(value)) + 32; size <= e.max {
			pattern, prefix, add = 0x40, 6, true
		}
	default:
		x.seen[slot] = tag
	}
	if i := staticNames[string(name)]; i != 0 {
		dst = appendVarInt(dst, pattern, prefix, uint64(i))
	} else if n := x.byName[nh%slots]; n > x.first && x.at(n-1).name == string(name) {
		dst = appendVarInt(dst, pattern, prefix, uint64(x.next-n)+staticLen+1)
	} else {
		dst = append(dst, pattern)
		dst = appendVarInt(dst, 0, 7, uint64(len(name)))
		dst = append(dst, name...)
	}
	dst = appendVarInt(dst, 0, 7, uint64(len(value)))
	dst = append(dst, value...)
	if add {
		e.add(name, value, slot, nh%slots)
	}
	return dst
}

func (e *encoder) add(name, value []byte, slot, nameSlot uint64) {
	x := e.ix
	ent := entry{name: string(name), value: string(value)}
	// Make room first: the ring has a place for each entry the size allows.
	for e.size+ent.size() > e.max {
		old := x.at(x.first)
		e.size -= old.size()
		*old = entry{}
		x.first++
	}
	if int(x.next-x.first) == len(x.ents) {
		grown := make([]entry, max(8, 2*len(x.ents)))
		for n := x.first; n < x.next; n++ {
			grown[n&uint32(len(grown)-1)] = *x.at(n)
		}
		x.ents = grown
	}
	*x.at(x.next) = ent
	e.size += ent.size()
	x.next++
	x.byField[slot], x.byName[nameSlot] = x.next, x.next
}

// secret reports whether a field never enters a table.
func secret(name, value []byte) bool {
	switch len(name) {
	case 6:
		return string(name) == "cookie" && len(value) < 20
	case 10:
		return string(name) == "set-cookie"
	case 13:
		return string(name) == "authorization"
	case 19:
		return string(name) == "proxy-authorization"
	default:
		return false
	}
}

// appendVarInt appends an integer with a prefix of n bits (RFC 7541 section
// 5.1), in a first byte with the given pattern.
func appendVarInt(dst []byte, pattern byte, n int, v uint64) []byte {
	most := uint64(1)<<n - 1
	if v < most {
		return append(dst, pattern|byte(v))
	}
	dst = append(dst, pattern|byte(most))
	for v -= most; v >= 128; v >>= 7 {
		dst = append(dst, byte(v)|0x80)
	}
	return append(dst, byte(v))
}

// staticLen is the number of entries of the static table (RFC 7541 appendix A).
const staticLen = 61

// Entries of the static table that are whole fields.
const (
	staticGET     = 0x80 | 2
	staticPOST    = 0x80 | 3
	staticRoot    = 0x80 | 4
	staticHTTP    = 0x80 | 6
	staticHTTPS   = 0x80 | 7
	static200     = 0x80 | 8
	nameAuthority = 1
	nameMethod    = 2
	namePath      = 4
	nameScheme    = 6
	nameStatus    = 8
)

// staticNames is the first entry of each name in the static table.
var staticNames = map[string]uint8{
	":authority": nameAuthority, ":method": nameMethod, ":path": namePath, ":scheme": nameScheme, ":status": nameStatus,
	"accept-charset": 15, "accept-encoding": 16, "accept-language": 17, "accept-ranges": 18, "accept": 19,
	"access-control-allow-origin": 20, "age": 21, "allow": 22, "authorization": 23, "cache-control": 24,
	"content-disposition": 25, "content-encoding": 26, "content-language": 27, "content-length": 28,
	"content-location": 29, "content-range": 30, "content-type": 31, "cookie": 32, "date": 33, "etag": 34, "expect": 35,
	"expires": 36, "from": 37, "host": 38, "if-match": 39, "if-modified-since": 40, "if-none-match": 41, "if-range": 42,
	"if-unmodified-since": 43, "last-modified": 44, "link": 45, "location": 46, "max-forwards": 47,
	"proxy-authenticate": 48, "proxy-authorization": 49, "range": 50, "referer": 51, "refresh": 52, "retry-after": 53,
	"server": 54, "set-cookie": 55, "strict-transport-security": 56, "transfer-encoding": 57, "user-agent": 58,
	"vary": 59, "via": 60, "www-authenticate": 61,
}
