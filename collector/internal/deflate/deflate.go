// Package deflate writes gzip (RFC 1952, RFC 1951) for a caller who knows what
// repeats. An output wraps each log line into a kilobyte of fields that the
// document before had byte for byte; to find them by a search costs more than to
// make the documents. Here the caller says so with a [Mark], and the bytes become a
// reference to their last occurrence; they are neither searched nor copied.
//
// The rest is searched as the fastest levels of other compressors do: one hash
// table, the first match that is found.
//
// It knows no records and does no I/O; the outputs call it.
package deflate

import (
	"encoding/binary"
	"math/bits"
)

// Limits of a Writer, which are its memory: novel bytes (64 KiB) and where they
// belong (32 KiB), the table (32 KiB), the symbols of a block (70 KiB) and the codes
// (10 KiB), however long the stream is or a piece of it; and what it knows of lengths
// that repeat (see maxPassings). More would make streams hardly smaller, and drive
// what else there is out of the processor's cache.
const (
	window     = 32 << 10 // how far back a reference reaches (RFC 1951, section 2)
	maxPlain   = 2 * window
	maxSymbols = 16 << 10                              // of a block
	maxHeld    = 64 << 10                              // of one match, before its last piece
	maxPieces  = 2 * ((maxHeld+maxPlain)/maxMatch + 2) // symbols of it
	hashBits   = 14
	slot       = 32 // bytes
	spare      = 8  // behind plain, so that its last bytes can be read as a word
)

const (
	// minMatch of a search. Shorter ones cost more than what they stand for, which is
	// mostly digits.
	minMatch = 5
	// minRepeat is how long a repeat is that is worth a reference.
	minRepeat = 8
	// A search that finds nothing takes longer steps: one byte more after each 1<<skip
	// bytes, up to maxStep.
	skip    = 5
	maxStep = 32
	// maxTrust is how often in a row it is tried to follow in vain.
	maxTrust = 8
)

// Mark remembers where bytes were written last. The zero Mark is one whose bytes
// were not, and so is, when it is used, one of another Writer, of a stream before the
// last Reset, or of another slice. The bytes of a slice may not change as long as its
// mark is used: the stream would be damaged, and its CRC would say so.
type Mark struct {
	of           *Writer
	data         *byte
	n            int
	last, before place
	sum          uint32   // the CRC's register after the bytes, had it been 0
	passes       *passing // n bytes; nil before the first repeat
}

// place is where bytes were written.
type place struct {
	at   int64 // position in all streams
	next int64 // index of the novel bytes after them, if there are any, of all there were
}

// Writer makes one gzip stream at a time, in memory. NewWriter makes one; it
// belongs to one goroutine.
type Writer struct {
	out  []byte
	acc  uint64 // bits of the last byte, which is not full
	have uint   // how many: fewer than 8
	crc  uint32 // its register

	// Positions count the bytes of all streams, so that what a mark says of an earlier
	// stream lies outside this one.
	start int64 // of the stream
	at    int64 // of what comes next

	// plain holds the novel bytes of the stream behind a window of others, the last
	// window of them at least, and not what repeats. What stands together in the stream
	// does so here; after a repeat it goes on in a slot of its own. It moves by whole
	// windows.
	plain *[maxPlain + spare]byte
	end   int   // of what is in plain
	base  int64 // how many have left it
	slots [maxPlain / slot]segment
	cut   bool // a repeat came last
	// table has, by the hash of what is there, an index of plain modulo 2^16, which may
	// be of a time before plain moved or was empty: only what is the same bytes counts.
	table [1 << hashBits]uint16

	symbols []uint32 // of the block: see symbolOf and extraAt
	block   int      // index of plain where the block began
	whole   bool     // all of the block is in plain
	held    held
	trust   int // how often follow may fail

	coding coding

	passings map[int]*passing // by how many bytes
}

// segment is what is known of the bytes in a slot, up to end.
type segment struct {
	shift int64 // from the index of a byte to its position
	end   int
}

// held is a match that is not among the symbols yet, since what follows may
// continue it.
type held struct {
	length   int
	distance int
	next     int // index of what follows its source in plain, if it is there at all
}

// NewWriter returns a Writer whose memory is all there. Reset begins a stream.
func NewWriter() *Writer {
	return &Writer{
		at:      window, // so that the zero Mark is of no stream
		end:     window,
		plain:   &[maxPlain + spare]byte{},
		symbols: make([]uint32, 0, maxSymbols+maxPieces+8),

		passings: map[int]*passing{},
	}
}

// header of a stream: deflate, no name, no time, the fastest method, no system.
const header = "\x1f\x8b\x08\x00\x00\x00\x00\x00\x04\xff"

// Reset begins a stream that is appended to out, and forgets one that is under way.
func (w *Writer) Reset(out []byte) {
	w.start = w.at
	w.base += int64(w.end) - window
	w.end, w.symbols, w.cut = window, w.symbols[:0], false
	w.block, w.whole, w.held = window, true, held{}
	w.crc, w.acc, w.have = ^uint32(0), 0, 0
	w.out = append(out, header...)
}

// Write adds bytes to the stream. They are copied.
func (w *Writer) Write(novel []byte) {
	w.crc = sum(w.crc, novel)
	for len(novel) > 0 {
		i := w.next()
		if i >= maxPlain {
			w.move()
			i = w.next()
		}
		n := min(len(novel), maxPlain-i)
		w.end = i + copy(w.plain[i:maxPlain], novel)
		novel = novel[n:]
		w.cut = false
		for s := i / slot; s <= (i+n-1)/slot; s++ {
			w.slots[s] = segment{w.at - int64(i), i + n}
		}
		w.search(i, i+n)
		w.at += int64(n)
	}
}

// Repeat adds bytes to the stream that are the same at each call with this mark.
// They are not copied.
func (w *Writer) Repeat(at *Mark, b []byte) {
	if len(b) < minRepeat {
		w.Write(b)
		return
	}
	here := place{at: w.at}
	if at.of != w || at.data != &b[0] || at.n != len(b) {
		*at = Mark{of: w, data: &b[0], n: len(b)}
	}
	if at.last.at >= w.start && w.at-at.last.at <= window {
		source := at.last
		// To go on with the match before takes less than to begin another.
		if w.held.length > 0 && w.at-at.before.at == int64(w.held.distance) && at.before.at >= w.start {
			source = at.before
		}
		if at.passes == nil {
			at.passes, at.sum = w.passing(len(b)), sum(0, b)
		}
		w.crc = at.passes.apply(w.crc) ^ at.sum
		w.hold(len(b), int(w.at-source.at), int(source.next-w.base))
		w.at += int64(len(b))
		w.cut, w.whole, w.trust = true, false, max(w.trust, 1)
	} else {
		w.Write(b)
	}
	here.next = w.base + int64(w.next())
	at.last, at.before = here, at.last
}

// Close ends the stream and returns what Reset was given with the stream behind it.
// The memory is the caller's.
func (w *Writer) Close() []byte {
	w.release()
	w.write(w.end, true)
	if w.have > 0 {
		w.put(0, 8-w.have)
	}
	out := binary.LittleEndian.AppendUint32(w.out, ^w.crc)
	out = binary.LittleEndian.AppendUint32(out, uint32(w.at-w.start)) // modulo 2^32, says RFC 1952
	w.out = nil
	return out
}

// next returns the index of the novel bytes that come next. It may be maxPlain.
func (w *Writer) next() int {
	if w.cut {
		return (w.end + slot - 1) &^ (slot - 1)
	}
	return w.end
}

// move makes room in plain and keeps the last window, and the block if it is whole.
func (w *Writer) move() {
	keep := w.end - window
	if w.whole {
		if w.block < window {
			w.whole = false
		} else {
			keep = min(keep, w.block)
		}
	}
	drop := keep &^ (window - 1)
	w.end = copy(w.plain[:], w.plain[drop:w.end])
	copy(w.slots[:], w.slots[drop/slot:])
	for i := range w.slots[:(w.end+slot-1)/slot] {
		w.slots[i].shift += int64(drop)
		w.slots[i].end -= drop
	}
	w.base += int64(drop)
	w.block -= drop
	w.held.next -= drop
}

// hold takes a match that begins where the one before ended.
func (w *Writer) hold(length, distance, next int) {
	if w.held.length > 0 && w.held.distance == distance && w.held.length+length <= maxHeld {
		w.held.length += length
		w.held.next = next
		return
	}
	w.release()
	w.held = held{length, distance, next}
}

// release makes symbols of the match that is held.
func (w *Writer) release() {
	if w.held.length == 0 {
		return
	}
	if len(w.symbols) >= maxSymbols {
		w.whole = false // where the match began is not known here
		w.write(0, false)
		w.whole = false
	}
	w.symbols = appendMatch(w.symbols, w.held.length, w.held.distance)
	w.held.length = 0
}

// search makes symbols of the novel bytes from i to end.
func (w *Writer) search(i, end int) {
	j := -1 // what stands where i does, beside the match before
	if w.held.length > 0 {
		if j = w.source(w.held.next, w.at-int64(w.held.distance)); j >= i {
			j = -1
		}
		if j >= 0 && w.held.length < maxHeld {
			n := common(w.plain[:min(end, i+w.slots[j/slot].end-j)], j, i)
			w.held.length += n
			w.held.next += n
			if i += n; i == end {
				return
			}
			j += n
		}
		w.release()
	}
	for i < end {
		if len(w.symbols) >= maxSymbols {
			w.write(i, false)
		}
		i = w.scan(i, j, min(end, i+maxSymbols-len(w.symbols)), end)
		j = -1
	}
}

// source returns j if the byte with the position is there, or -1.
func (w *Writer) source(j int, position int64) int {
	if j >= 0 && j < w.end && w.slots[j/slot].shift+int64(j) == position && j < w.slots[j/slot].end {
		return j
	}
	return -1
}

// scan is search for what begins before stop; there is room for as many symbols. It
// returns where it got to.
func (w *Writer) scan(i, beside, stop, end int) int {
	b := w.plain[:end]
	shift := w.slots[(end-1)/slot].shift
	last := min(stop, end-minMatch+1)
	for from := i; ; {
		j := -1
		if beside >= 0 && w.trust > 0 {
			if i, j = w.follow(i, beside, last); j < 0 {
				w.trust--
			} else {
				w.trust = min(w.trust+2, maxTrust)
				w.table[hash(w.word(i))] = uint16(i)
			}
			beside = -1
		}
		if j < 0 {
			if i, j = w.find(i, last, from); j < 0 {
				w.symbols = w.appendLiterals(w.symbols, from, stop)
				return stop
			}
		}
		s := &w.slots[j/slot]
		length := common(b[:min(end, i+s.end-j)], j, i)
		source := int64(j) + s.shift
		distance := int64(i) + shift - source
		if length < minMatch || distance > window || source < w.start {
			i++
			continue
		}
		for i > from && b[i-1] == b[j-1] && j%slot > 0 {
			i, j, length = i-1, j-1, length+1
		}
		w.symbols = w.appendLiterals(w.symbols, from, i)
		i += length
		j += length
		if i == end {
			w.held = held{length, int(distance), j}
			return i
		}
		w.symbols = appendMatch(w.symbols, length, int(distance))
		if i-2 < last {
			w.table[hash(w.word(i-2))] = uint16(i - 2)
		}
		if i >= stop {
			return i
		}
		from = i
		if j < s.end {
			beside = j
		}
	}
}

// follow looks for the next bytes from i on, and before last, that are those beside
// j once more: where a line has a number that the line before had not, what follows
// is often the same again. It returns -1 if there are none soon.
func (w *Writer) follow(i, j, last int) (at, source int) {
	const (
		far  = 18 // bytes
		run  = 3  // of bytes is worth a look
		low  = 0x7f7f7f7f7f7f7f7f
		high = ^uint64(low)
	)
	for n := 0; n < far; n += spare - run + 1 {
		x := w.word(i+n) ^ w.word(j+n)
		same := ^(x&low + low | x) & high // bit 7 of each byte that is
		if same &= same >> 8 & (same >> 16); same != 0 {
			n += bits.TrailingZeros64(same) / 8
			if i+n >= last {
				break
			}
			if (w.word(i+n)^w.word(j+n))<<(64-8*minMatch) == 0 {
				return i + n, j + n
			}
			n -= spare - 2*run + 1 // these are too few: go on behind them
		}
	}
	return i, -1
}

// find returns the first index from i on, and before last, of bytes that may be
// those at another, and that other; -1 if there is none. from is where the search
// began that has found nothing so far.
func (w *Writer) find(i, last, from int) (at, source int) {
	for i < last {
		v := w.word(i)
		entry := &w.table[hash(v)]
		j := i - int(uint16(i)-*entry)&(window-1)
		*entry = uint16(i)
		if (v^w.word(j))<<(64-8*minMatch) == 0 && j != i {
			return i, j
		}
		if i++; i-from > 1<<skip {
			i += min((i-from)>>skip, maxStep)
		}
	}
	return last, -1
}

// word returns the bytes at i, which is in plain.
func (w *Writer) word(i int) uint64 {
	k := uint(i) % maxPlain // as the compiler does not know
	return binary.LittleEndian.Uint64(w.plain[k : k+8])
}

// appendLiterals appends the bytes from i to end. Eight at a time are right more
// often than the processor's guess where a loop over one would end.
func (w *Writer) appendLiterals(symbols []uint32, i, end int) []uint32 {
	n := len(symbols)
	s := symbols[:n+(end-i+7)&^7]
	for ; i < end; i += 8 {
		v := w.word(i)
		t := s[n : n+8]
		t[0], t[1], t[2], t[3] = uint32(v)&255, uint32(v>>8)&255, uint32(v>>16)&255, uint32(v>>24)&255
		t[4], t[5], t[6], t[7] = uint32(v>>32)&255, uint32(v>>40)&255, uint32(v>>48)&255, uint32(v>>56)
		n += 8
	}
	return s[:n-(i-end)]
}

// hash is of the first minMatch bytes of v.
func hash(v uint64) uint64 {
	return v << (64 - 8*minMatch) * 0x9e3779b185ebca87 >> (64 - hashBits)
}

// common returns how many bytes at i are the same as those at j, which is before i.
func common(b []byte, j, i int) int {
	n := 0
	for ; i+n+8 <= len(b); n += 8 {
		if x := binary.LittleEndian.Uint64(b[i+n:]) ^ binary.LittleEndian.Uint64(b[j+n:]); x != 0 {
			return n + bits.TrailingZeros64(x)>>3
		}
	}
	for i+n < len(b) && b[i+n] == b[j+n] {
		n++
	}
	return n
}
