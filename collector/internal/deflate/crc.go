package deflate

import "hash/crc32"

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
			r := ^(uint32(bit) << (4 * i)) // hash/crc32 has it inverted
			for left := n; left > 0; left -= len(zeros) {
				r = crc32.Update(r, crc32.IEEETable, zeros[:min(left, len(zeros))])
			}
			for other := range bit {
				p[i][bit+other] = p[i][other] ^ ^r
			}
		}
	}
	w.passings[n] = p
	return p
}
