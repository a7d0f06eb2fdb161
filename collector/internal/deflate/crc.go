package deflate

import (
	"encoding/binary"
	"hash/crc32"
)

// maxPassings bounds how many lengths of repeats a Writer knows; they have 512 bytes
// each. Over it, all are forgotten and made again.
const maxPassings = 256

// passing is what becomes of the CRC's register while a number of zero bytes pass:
// an XOR of what becomes of each four bits of it. The register after other bytes is
// that, XOR what those bytes make of zero. So bytes that repeat are summed once.
type passing [8][16]uint32

func (p *passing) apply(r uint32) uint32 {
	return p[0][r&15] ^ p[1][r>>4&15] ^ p[2][r>>8&15] ^ p[3][r>>12&15] ^
		p[4][r>>16&15] ^ p[5][r>>20&15] ^ p[6][r>>24&15] ^ p[7][r>>28]
}

// sum returns the register r after the bytes b. hash/crc32 is the fastest for whole
// blocks and slow for what is left over, or all there is: that takes eight at a time
// here.
func sum(r uint32, b []byte) uint32 {
	if len(b) >= 64 {
		n := len(b) &^ 15
		r = ^crc32.Update(^r, crc32.IEEETable, b[:n]) // which has the register inverted
		b = b[n:]
	}
	for ; len(b) >= 8; b = b[8:] {
		v := binary.LittleEndian.Uint64(b) ^ uint64(r)
		r = eight[7][v&255] ^ eight[6][v>>8&255] ^ eight[5][v>>16&255] ^ eight[4][v>>24&255] ^
			eight[3][v>>32&255] ^ eight[2][v>>40&255] ^ eight[1][v>>48&255] ^ eight[0][v>>56]
	}
	for _, c := range b {
		r = eight[0][byte(r)^c] ^ r>>8
	}
	return r
}

// eight has what becomes of a register of eight bits while 1 to 8 bytes pass.
var eight = func() (t [8][256]uint32) {
	t[0] = *crc32.IEEETable
	for n := 1; n < len(t); n++ {
		for i, r := range t[n-1] {
			t[n][i] = t[0][byte(r)] ^ r>>8
		}
	}
	return t
}()

var zeros [4 << 10]byte

// passing returns what n bytes do.
func (w *Writer) passing(n int) *passing {
	if p := w.passings[n]; p != nil {
		return p
	}
	if len(w.passings) >= maxPassings {
		clear(w.passings)
	}
	p := &passing{}
	for i := range p {
		for bit := 1; bit < 16; bit *= 2 {
			r := uint32(bit) << (4 * i)
			for left := n; left > 0; left -= len(zeros) {
				r = sum(r, zeros[:min(left, len(zeros))])
			}
			for other := range bit {
				p[i][bit+other] = p[i][other] ^ r
			}
		}
	}
	w.passings[n] = p
	return p
}
