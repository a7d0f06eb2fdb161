// Package jsontext appends values as JSON, for the outputs that write so many
// records that encoding/json would be most of their work.
//
// It knows JSON (RFC 8259) and the form of our times. It does not know records;
// the outputs call it.
package jsontext

import (
	"encoding/binary"
	"math"
	"math/bits"
	"strconv"
	"time"
	"unicode/utf8"
)

const hexDigits = "0123456789abcdef"

// AppendString appends s as a JSON string (RFC 8259, section 7). Bytes that are
// not UTF-8 become U+FFFD, one each, as encoding/json does.
func AppendString(b []byte, s string) []byte {
	b = append(b, '"')
	start := len(b)
	b = append(b, s...)
	if n := plain(b[start:]); n < len(s) {
		b = appendEscaped(b[:start+n], s[n:])
	}
	return append(b, '"')
}

// plain returns how many bytes b begins with that can stand in a JSON string as
// they are and do not begin a rune of several bytes.
func plain(b []byte) int {
	i := 0
	for ; i+16 <= len(b); i += 16 {
		if special(binary.LittleEndian.Uint64(b[i:]))|special(binary.LittleEndian.Uint64(b[i+8:])) != 0 {
			break
		}
	}
	for ; i+8 <= len(b); i += 8 {
		if m := special(binary.LittleEndian.Uint64(b[i:])); m != 0 {
			return i + bits.TrailingZeros64(m)/8
		}
	}
	for i < len(b) && b[i] >= ' ' && b[i] != '"' && b[i] != '\\' && b[i] < utf8.RuneSelf {
		i++
	}
	return i
}

// special marks the bytes among eight that plain stops at: bit 7 of each. The lowest
// mark is exact, those above it may be wrong by a borrow.
func special(x uint64) uint64 {
	const ones, high = 0x0101010101010101, 0x8080808080808080
	return (x | (x - ones*' ') | (x ^ ones*'"' - ones) | (x ^ ones*'\\' - ones)) & high
}

func word(s string) uint64 {
	_ = s[7]
	return uint64(s[0]) | uint64(s[1])<<8 | uint64(s[2])<<16 | uint64(s[3])<<24 |
		uint64(s[4])<<32 | uint64(s[5])<<40 | uint64(s[6])<<48 | uint64(s[7])<<56
}

// appendEscaped is AppendString without the quotes, for strings that plain stopped in.
func appendEscaped(b []byte, s string) []byte {
	start := 0
	for i := 0; i < len(s); {
		if i+8 <= len(s) { // to the next byte that needs a look
			m := special(word(s[i : i+8]))
			if m == 0 {
				i += 8
				continue
			}
			i += bits.TrailingZeros64(m) / 8
		}
		c := s[i]
		if c >= utf8.RuneSelf {
			r, size := utf8.DecodeRuneInString(s[i:])
			if r == utf8.RuneError && size == 1 {
				b = append(append(b, s[start:i]...), `\ufffd`...)
				start = i + 1
			}
			i += size
			continue
		}
		if c >= ' ' && c != '"' && c != '\\' {
			i++
			continue
		}
		b = append(b, s[start:i]...)
		switch c {
		case '"', '\\':
			b = append(b, '\\', c)
		case '\n':
			b = append(b, '\\', 'n')
		case '\r':
			b = append(b, '\\', 'r')
		case '\t':
			b = append(b, '\\', 't')
		default:
			b = append(b, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
		}
		i++
		start = i
	}
	return append(b, s[start:]...)
}

// AppendFloat appends a number. What lies beyond the integers of 64 bits is
// written with an exponent, since Elasticsearch refuses longer integers. JSON has
// no NaN and no infinities: they are written as text, and the mapping decides.
func AppendFloat(b []byte, f float64) []byte {
	a := math.Abs(f)
	switch {
	case math.IsNaN(f) || math.IsInf(f, 0):
		b = append(b, '"')
		b = strconv.AppendFloat(b, f, 'g', -1, 64)
		return append(b, '"')
	case f == math.Trunc(f) && a < 1<<53:
		if f == 0 && math.Signbit(f) {
			return append(b, "-0"...)
		}
		return strconv.AppendInt(b, int64(f), 10)
	case a != 0 && (a < 1e-6 || a >= 1<<63):
		return strconv.AppendFloat(b, f, 'e', -1, 64)
	}
	return strconv.AppendFloat(b, f, 'f', -1, 64)
}

// Clock appends times of record.Fields' form. It remembers the last second, which
// neighbouring lines share; it belongs to one goroutine.
type Clock struct {
	second int64
	stamp  [len("2006-01-02T15:04:05.")]byte
}

// Append appends the time t, without quotes.
func (c *Clock) Append(b []byte, t time.Time) []byte {
	second := t.Unix()
	if second != c.second || c.stamp[0] == 0 {
		t = t.UTC()
		if year := t.Year(); year < 0 || year > 9999 {
			return t.AppendFormat(b, "2006-01-02T15:04:05.000000000Z07:00")
		}
		t.AppendFormat(c.stamp[:0], "2006-01-02T15:04:05.")
		c.second = second
	}
	b = append(b, c.stamp[:]...)
	n := t.Nanosecond()
	b = append(b, "000000000Z"...)
	for i := len(b) - 2; n > 0; i-- {
		b[i] = '0' + byte(n%10)
		n /= 10
	}
	return b
}
