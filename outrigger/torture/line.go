package torture

import (
	"bytes"
	"hash/crc32"
	"strconv"
	"unicode/utf8"
)

// Every line of the kit carries a head: whose it is, its number, when it was
// written, how long its filling is, of what kind it is, and a check word over all
// that. The filling is computed from the number, so that a judge who sees the
// head knows every byte that has to follow it.
//
//	torture1 <source> <number> <unix ns> <bytes of filling> <kind> <crc32> <filling>
const mark = "torture1 "

// kind of a line: what a collector may do to it.
type kind byte

const (
	plain    kind = '-' // arrives byte for byte
	embedded kind = 'e' // stands in something else, such as JSON or garbage: only the head is judged
	long     kind = 'l' // may be cut, and is a prefix then
)

// head is what a line says of itself.
type head struct {
	source, number uint32
	written        int64 // nanoseconds since 1970
	filling        int
	kind           kind
}

func (h head) appendTo(b []byte) []byte {
	start := len(b)
	b = append(b, mark...)
	b = strconv.AppendUint(b, uint64(h.source), 10)
	b = append(b, ' ')
	b = strconv.AppendUint(b, uint64(h.number), 10)
	b = append(b, ' ')
	b = strconv.AppendInt(b, h.written, 10)
	b = append(b, ' ')
	b = strconv.AppendInt(b, int64(h.filling), 10)
	b = append(b, ' ', byte(h.kind), ' ')
	check := crc32.ChecksumIEEE(b[start:])
	return append(strconv.AppendUint(b, uint64(check), 16), ' ')
}

// alphabet of fillings: what JSON, msgpack and shells make something of.
const alphabet = `abc "quoted" \back\\slash {"a":1} <tag> 100% äöü 漢字 0123456789 key=value [x] tab	end; `

// line returns a whole line of the text's kind.
func (h head) line() []byte {
	b := h.appendTo(make([]byte, 0, 80+h.filling))
	return appendFilling(b, h.number, h.filling)
}

// appendFilling appends n bytes that depend on the number alone. A letter of more
// bytes than are left is replaced, so that the text is valid UTF-8.
func appendFilling(b []byte, number uint32, n int) []byte {
	end := len(b) + n
	for i := int(number) % 7; len(b) < end; i = 0 { // no letter of more bytes stands that far to the left
		b = append(b, alphabet[i:]...)
	}
	b = b[:end]
	last := end - 1
	for last > 0 && last > end-utf8.UTFMax && !utf8.RuneStart(b[last]) {
		last--
	}
	if n > 0 && !utf8.FullRune(b[last:]) {
		for i := last; i < end; i++ {
			b[i] = '~'
		}
	}
	return b
}

// parse finds the first head in the text and returns what stands behind it.
func parse(text []byte) (h head, rest []byte, ok bool) {
	i := bytes.Index(text, []byte(mark))
	if i < 0 {
		return h, nil, false
	}
	text = text[i:]
	at := len(mark)
	number := func() uint64 {
		end := bytes.IndexByte(text[at:], ' ')
		if end < 0 || end > 20 {
			at = len(text)
			return 0
		}
		n, err := strconv.ParseUint(string(text[at:at+end]), 10, 64)
		if err != nil {
			at = len(text)
			return 0
		}
		at += end + 1
		return n
	}
	h.source, h.number = uint32(number()), uint32(number())
	h.written, h.filling = int64(number()), int(number())
	if at+2 > len(text) || text[at+1] != ' ' {
		return h, nil, false
	}
	h.kind = kind(text[at])
	at += 2
	end := bytes.IndexByte(text[at:], ' ')
	if end < 0 || end > 8 {
		return h, nil, false
	}
	check, err := strconv.ParseUint(string(text[at:at+end]), 16, 32)
	if err != nil || uint32(check) != crc32.ChecksumIEEE(text[:at]) {
		return h, nil, false
	}
	return h, text[at+end+1:], true
}

// whole says whether the rest is the filling of the line, and whether it is a
// part of it from its beginning.
func (h head) whole(rest []byte) (whole, prefix bool) {
	want := appendFilling(make([]byte, 0, h.filling+len(alphabet)), h.number, h.filling)
	if bytes.Equal(rest, want) {
		return true, true
	}
	n := min(len(rest), len(want))
	for n > 0 && n > len(rest)-8 && rest[n-1] >= 0x80 { // the cut may have gone through a letter
		n--
	}
	return false, len(rest) < len(want) && bytes.HasPrefix(want, rest[:n])
}
