package deflate

import (
	"encoding/binary"
	"math/bits"
	"slices"
)

// Of RFC 1951, section 3.2.
const (
	maxMatch      = 258
	shortest      = 3 // match
	endOfBlock    = 256
	firstLength   = 257
	lastLength    = 285 // which is maxMatch without extra bits
	numLiterals   = 288 // with lengths and the two that only the fixed code has
	numDistances  = 30
	numLengths    = 19 // symbols of the code for the lengths of codes
	maxBits       = 15
	maxBitsLength = 7
	maxStored     = 1<<16 - 1
)

// What a block begins with, after the bit that says whether it is the last.
const (
	stored = iota
	fixed
	dynamic
)

// A symbol in the order in which the stream has them: the number of a literal or
// length, or of a distance from firstDistance on, and above that its extra bits.
const (
	firstDistance = numLiterals
	symbolOf      = 1<<extraAt - 1
	extraAt       = 9
)

// appendMatch appends the symbols of a match, which may be longer than one of the
// format.
func appendMatch(symbols []uint32, length, distance int) []uint32 {
	d := distanceSymbol(distance)
	for length > maxMatch {
		n := maxMatch
		if length < maxMatch+shortest { // the rest would be too short
			n -= shortest
		}
		length -= n
		symbols = append(symbols, lengthSymbols[n], d)
	}
	return append(symbols, lengthSymbols[length], d)
}

// lengthSymbols are the symbols of all lengths.
var lengthSymbols = func() (symbols [maxMatch + 1]uint32) {
	for length := shortest; length < maxMatch; length++ {
		x := uint32(length - shortest)
		n := max(bits.Len32(x)-3, 0)
		symbols[length] = firstLength + uint32(4*n) + x>>n | x&(1<<n-1)<<extraAt
	}
	symbols[maxMatch] = lastLength
	return symbols
}()

func distanceSymbol(distance int) uint32 {
	x := uint32(distance - 1)
	if x < 4 {
		return firstDistance + x
	}
	n := bits.Len32(x) - 2
	return firstDistance + uint32(2*n) + x>>n | x&(1<<n-1)<<extraAt
}

// extraBits returns how many extra bits a symbol has.
func extraBits(symbol int) int {
	switch {
	case symbol >= firstDistance:
		return max((symbol-firstDistance)/2-1, 0)
	case symbol >= firstLength+8 && symbol < lastLength:
		return (symbol-firstLength)/4 - 1
	}
	return 0
}

// coding is the codes of a block.
type coding struct {
	count   [2][1 << extraAt]uint32 // how often each symbol is wanted: their sum
	sizes   [1 << extraAt]uint8     // of their codes, in bits
	codes   [1 << extraAt]bitString // with how many extra bits follow
	lengths struct {                // the same of the code for sizes
		count [numLengths]uint32
		sizes [numLengths]uint8
		codes [numLengths]bitString
	}
	runs      [numLiterals + numDistances]run
	numRuns   int
	nLiterals int // of the symbols that have codes, the highest, and one
	nDistance int
	nLengths  int
}

// run is a symbol of the code for sizes, and what follows it.
type run struct{ symbol, extra uint8 }

// bitString is the code of a symbol, the first bit lowest, its size from bit 16 on,
// and from bit 24 on the size with the extra bits.
type bitString uint32

func (s bitString) bits() uint64 { return uint64(s & (1<<16 - 1)) }
func (s bitString) size() uint   { return uint(s >> 16 & 255) }
func (s bitString) all() uint    { return uint(s >> 24) }

// write writes the symbols as one block in the form that is shortest. If the block is
// whole, they are what plain has up to end.
func (w *Writer) write(end int, last bool) {
	if len(w.symbols) > 0 || last {
		w.encode(end, last)
	}
	w.symbols = w.symbols[:0]
	w.block, w.whole = end, true
}

func (w *Writer) encode(end int, last bool) {
	c := &w.coding
	w.symbols = append(w.symbols, endOfBlock)
	c.countAll(w.symbols)
	asFixed := c.cost(&fixedSizes)
	build(c.count[0][:firstDistance], c.sizes[:firstDistance], maxBits)
	build(c.count[0][firstDistance:firstDistance+numDistances], c.sizes[firstDistance:firstDistance+numDistances], maxBits)
	asDynamic := c.describe() + c.cost(&c.sizes)
	best := min(asFixed, asDynamic)
	if w.whole {
		n := end - w.block
		asStored := 8 * (n + 5*(1+n/maxStored)) // 5 for the header of each, aligned
		best = min(best, asStored)
	}
	w.out = slices.Grow(w.out, best/8+32)
	switch best {
	case asDynamic:
		w.put(b2u(last)|dynamic<<1, 3)
		w.head()
	case asFixed:
		w.put(b2u(last)|fixed<<1, 3)
		c.sizes = fixedSizes
	default:
		w.store(w.plain[w.block:end], last)
		return
	}
	assign(c.sizes[:firstDistance], c.codes[:firstDistance])
	assign(c.sizes[firstDistance:firstDistance+numDistances], c.codes[firstDistance:])
	for s := firstLength; s < firstDistance+numDistances; s++ {
		c.codes[s] += bitString(extraBits(s)) << 24
	}
	w.body()
}

func b2u(b bool) uint64 {
	if b {
		return 1
	}
	return 0
}

// put writes at most 32 bits. There has to be room for 8 bytes.
func (w *Writer) put(v uint64, n uint) {
	w.acc |= v << w.have
	w.have += n
	for ; w.have >= 8; w.have -= 8 {
		w.out = append(w.out, byte(w.acc))
		w.acc >>= 8
	}
}

// store writes plain bytes (section 3.2.4).
func (w *Writer) store(plain []byte, last bool) {
	for {
		n := min(len(plain), maxStored)
		w.put(b2u(last && n == len(plain))|stored<<1, 3)
		if w.have > 0 {
			w.put(0, 8-w.have)
		}
		w.out = binary.LittleEndian.AppendUint16(w.out, uint16(n))
		w.out = binary.LittleEndian.AppendUint16(w.out, ^uint16(n))
		w.out = append(w.out, plain[:n]...)
		if plain = plain[n:]; len(plain) == 0 {
			return
		}
	}
}

// countAll counts the symbols of a block. Two tables take turns: the processor waits
// where one place is counted up twice in a row.
func (c *coding) countAll(symbols []uint32) {
	clear(c.count[0][:])
	clear(c.count[1][:])
	for ; len(symbols) >= 2; symbols = symbols[2:] {
		c.count[0][symbols[0]&symbolOf]++
		c.count[1][symbols[1]&symbolOf]++
	}
	for _, s := range symbols {
		c.count[0][s&symbolOf]++
	}
	for s, n := range c.count[1] {
		c.count[0][s] += n
	}
}

// cost returns how many bits the symbols take where their codes have these sizes.
func (c *coding) cost(sizes *[1 << extraAt]uint8) int {
	sum := 0
	for s, n := range c.count[0][:firstDistance+numDistances] {
		if n > 0 {
			sum += int(n) * (int(sizes[s]) + extraBits(s))
		}
	}
	return sum
}

// build makes a Huffman code (section 3.2.2) for symbols of which each is wanted as
// often as counts says: the sizes of their codes, none above limit. It gives codes to
// two symbols at least: there are decoders that refuse a code that leaves bits
// without a meaning.
func build(counts []uint32, sizes []uint8, limit int) {
	var (
		leaves  [numLiterals]uint32 // count and symbol, the rarest first
		weights [2 * numLiterals]uint32
		above   [2 * numLiterals]uint16 // the node above each, and then how deep it lies
	)
	clear(sizes)
	used := 0
	for s, n := range counts {
		if n > 0 {
			leaves[used] = n<<extraAt | uint32(s) // a block has fewer than 2^23 symbols
			used++
		}
	}
	for s := uint32(0); used < 2; s++ {
		if counts[s] == 0 {
			leaves[used] = 1<<extraAt | s
			used++
		}
	}
	slices.Sort(leaves[:used])
	for i, leaf := range leaves[:used] {
		weights[i] = leaf >> extraAt
	}
	// Nodes are made in the order of their weights, so the two lightest of all are
	// among the next leaf and the next node.
	leaf, node := 0, used
	root := 2*used - 2
	for made := used; made <= root; made++ {
		for range 2 {
			least := &node
			if leaf < used && (node == made || weights[leaf] <= weights[node]) {
				least = &leaf
			}
			weights[made] += weights[*least]
			above[*least] = uint16(made)
			*least++
		}
	}
	var sized [maxBits + 1]int // how many leaves have each size
	above[root] = 0
	for i := root - 1; i >= 0; i-- {
		above[i] = above[above[i]] + 1
		if i < used {
			sized[min(int(above[i]), limit)]++
		}
	}
	// Leaves that were deeper than limit take more of the code than there is. Each
	// turn gives one of them a place beside a leaf that moves down by one.
	over := -(1 << limit)
	for size := 1; size <= limit; size++ {
		over += sized[size] << (limit - size)
	}
	for ; over > 0; over-- {
		size := limit - 1
		for sized[size] == 0 {
			size--
		}
		sized[size]--
		sized[size+1] += 2
		sized[limit]--
	}
	i := 0
	for size := limit; size > 0; size-- {
		for range sized[size] {
			sizes[leaves[i]&symbolOf] = uint8(size)
			i++
		}
	}
}

// assign makes the codes by their sizes (section 3.2.2).
func assign(sizes []uint8, codes []bitString) {
	var next [maxBits + 2]uint16
	for _, size := range sizes {
		next[size+1]++
	}
	next[1] = 0 // symbols without a code
	for size := 1; size <= maxBits; size++ {
		next[size+1] += next[size]
		next[size+1] <<= 1
	}
	for s, size := range sizes {
		codes[s] = bitString(bits.Reverse16(next[size])>>(16-size)) | bitString(size)<<16 | bitString(size)<<24
		next[size]++
	}
}

// describe makes the description of both codes (section 3.2.7) and returns how many
// bits it has.
func (c *coding) describe() int {
	c.nLiterals, c.nDistance = numLiterals-2, numDistances
	for c.sizes[c.nLiterals-1] == 0 {
		c.nLiterals--
	}
	for c.sizes[firstDistance+c.nDistance-1] == 0 {
		c.nDistance--
	}
	var sizes [numLiterals + numDistances]uint8
	all := sizes[:copy(sizes[:], c.sizes[:c.nLiterals])+c.nDistance]
	copy(all[c.nLiterals:], c.sizes[firstDistance:])

	clear(c.lengths.count[:])
	c.numRuns = 0
	add := func(symbol uint8, extra int) {
		c.runs[c.numRuns] = run{symbol, uint8(extra)}
		c.numRuns++
		c.lengths.count[symbol]++
	}
	for i := 0; i < len(all); {
		size, n := all[i], 1
		for i+n < len(all) && all[i+n] == size {
			n++
		}
		i += n
		if size > 0 {
			add(size, 0)
			n--
		}
		for n > 0 {
			k := 1
			switch {
			case n < 3:
				add(size, 0)
			case size > 0:
				k = min(n, 6)
				add(16, k-3)
			case n < 11:
				k = n
				add(17, k-3)
			default:
				k = min(n, 138)
				add(18, k-11)
			}
			n -= k
		}
	}
	build(c.lengths.count[:], c.lengths.sizes[:], maxBitsLength)
	assign(c.lengths.sizes[:], c.lengths.codes[:])
	c.nLengths = numLengths
	for c.lengths.sizes[lengthsOrder[c.nLengths-1]] == 0 {
		c.nLengths--
	}
	n := 5 + 5 + 4 + 3*c.nLengths
	for _, r := range c.runs[:c.numRuns] {
		n += int(c.lengths.sizes[r.symbol]) + extraOfLength(r.symbol)
	}
	return n
}

// lengthsOrder is in which order the sizes of the code for lengths are written.
var lengthsOrder = [numLengths]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

func extraOfLength(symbol uint8) int {
	switch symbol {
	case 16:
		return 2
	case 17:
		return 3
	case 18:
		return 7
	}
	return 0
}

// head writes the description.
func (w *Writer) head() {
	c := &w.coding
	w.put(uint64(c.nLiterals-257), 5)
	w.put(uint64(c.nDistance-1), 5)
	w.put(uint64(c.nLengths-4), 4)
	for _, s := range lengthsOrder[:c.nLengths] {
		w.put(uint64(c.lengths.sizes[s]), 3)
	}
	for _, r := range c.runs[:c.numRuns] {
		s := c.lengths.codes[r.symbol]
		w.put(s.bits(), s.size())
		w.put(uint64(r.extra), uint(extraOfLength(r.symbol)))
	}
}

// body writes the symbols with their codes.
func (w *Writer) body() {
	codes := &w.coding.codes
	out, at := w.out[:cap(w.out)], len(w.out)
	acc, have := w.acc, w.have
	symbols := w.symbols
	for ; len(symbols) >= 2; symbols = symbols[2:] {
		// Two take 48 bits at most, beside the 7 that are there.
		s := symbols[0]
		c := codes[s&symbolOf]
		acc |= (c.bits() | uint64(s>>extraAt)<<(c.size()&31)) << (have & 63)
		have += c.all()
		s = symbols[1]
		c = codes[s&symbolOf]
		acc |= (c.bits() | uint64(s>>extraAt)<<(c.size()&31)) << (have & 63)
		have += c.all()
		binary.LittleEndian.PutUint64(out[at:], acc)
		at += int(have >> 3)
		acc >>= have & 56
		have &= 7
	}
	w.out, w.acc, w.have = out[:at], acc, have
	if len(symbols) > 0 { // the end of the block, then
		w.put(codes[endOfBlock].bits(), codes[endOfBlock].size())
	}
}

// fixedSizes are the sizes of the fixed codes (section 3.2.6).
var fixedSizes = func() (sizes [1 << extraAt]uint8) {
	for s := range numLiterals {
		switch {
		case s < 144:
			sizes[s] = 8
		case s < 256:
			sizes[s] = 9
		case s < 280:
			sizes[s] = 7
		default:
			sizes[s] = 8
		}
	}
	for s := range numDistances {
		sizes[firstDistance+s] = 5
	}
	return sizes
}()
