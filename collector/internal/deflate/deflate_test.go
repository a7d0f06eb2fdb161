package deflate

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
)

// unzip reads one stream that fills b, as the standard library does: it checks the
// codes, the CRC and the size.
func unzip(t testing.TB, b []byte) []byte {
	t.Helper()
	rest := bytes.NewReader(b)
	r, err := gzip.NewReader(rest)
	if err != nil {
		t.Fatal(err)
	}
	r.Multistream(false)
	plain, err := io.ReadAll(r)
	if err != nil {
		t.Fatalf("after %d bytes: %v", len(plain), err)
	}
	if rest.Len() > 0 {
		t.Fatalf("%d bytes follow the stream", rest.Len())
	}
	return plain
}

func check(t testing.TB, want, zipped []byte) {
	t.Helper()
	got := unzip(t, zipped)
	if !bytes.Equal(got, want) {
		i := 0
		for i < min(len(got), len(want)) && got[i] == want[i] {
			i++
		}
		t.Fatalf("%d bytes come back as %d and differ from byte %d", len(want), len(got), i)
	}
}

func random(seed uint64, n, symbols int) []byte {
	rng := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.IntN(symbols))
	}
	return b
}

// What is written comes back, whatever it is.
func TestWrite(t *testing.T) {
	w := NewWriter()
	for _, c := range []struct {
		name  string
		plain []byte
		most  int // bytes of the stream
	}{
		{"nothing", nil, 20},
		{"one byte", []byte("x"), 21},
		{"one symbol", bytes.Repeat([]byte("a"), 1<<20), 9000},
		{"two symbols", random(1, 1<<16, 2), 14_000},
		{"digits", random(2, 1<<20, 10), 500_000},
		{"what cannot be made smaller", random(3, 1<<20, 256), 1<<20 + 400},
		{"a stored block exactly", random(4, maxSymbols, 256), maxSymbols + 18 + 5 + 2},
		{"one more", random(4, maxSymbols+1, 256), maxSymbols + 1 + 18 + 5 + 4},
		{"every length of a match", lengths(), 1 << 20},
		{"rare symbols", rare(), 1 << 20},
		{"text", []byte(strings.Repeat("to be, or not to be: that is the question\n", 30)), 150},
		{"a long period", bytes.Repeat(random(5, window, 256), 4), 4*window + 100},
		{"one that is too long", bytes.Repeat(random(6, window+1, 256), 4), 4*window + 100},
		{"four blocks and a bit", random(7, 4*maxPlain+1, 200), 4*maxPlain + 100},
	} {
		w.Reset(nil)
		w.Write(c.plain)
		zipped := w.Close()
		check(t, c.plain, zipped)
		t.Logf("%s: %d bytes of %d", c.name, len(zipped), len(c.plain))
		if len(zipped) > c.most {
			t.Errorf("%s: %d bytes of %d; want %d at most", c.name, len(zipped), len(c.plain), c.most)
		}
	}
}

// lengths are repeats of 1 to 600 bytes with other bytes between them.
func lengths() []byte {
	text := random(8, 1000, 256)
	b := bytes.Clone(text)
	for n := 1; n <= 600; n++ {
		b = append(b, text[:n]...)
		b = append(b, byte(n), byte(n>>8), '.')
	}
	return b
}

// rare are symbols whose best code would be longer than the format takes: each is
// wanted as often as the two before.
func rare() []byte {
	var b []byte
	x, y := 1, 1
	for s := 0; len(b) < maxPlain; s++ {
		b = append(b, bytes.Repeat([]byte{byte(s)}, x)...)
		x, y = y, x+y
	}
	rand.New(rand.NewPCG(9, 1)).Shuffle(len(b), func(i, j int) { b[i], b[j] = b[j], b[i] })
	return b
}

// An empty stream is the same bytes for ever.
func TestNothing(t *testing.T) {
	w := NewWriter()
	w.Reset([]byte("before "))
	if got, want := fmt.Sprintf("%q", w.Close()), `"before \x1f\x8b\b\x00\x00\x00\x00\x00\x04\xff\x03\x00\x00\x00\x00\x00\x00\x00\x00\x00"`; got != want {
		t.Errorf("%s; want %s", got, want)
	}
}

// script drives a Writer and keeps what it should have written. Marks have slices of
// their own, as their contract says.
type script struct {
	w     *Writer
	marks []Mark
	texts [][]byte
	plain []byte
	out   []byte
}

func newScript(texts ...[]byte) *script {
	s := &script{w: NewWriter(), marks: make([]Mark, len(texts)), texts: texts}
	s.w.Reset(nil)
	return s
}

func (s *script) write(b []byte) {
	s.w.Write(b)
	s.plain = append(s.plain, b...)
}

func (s *script) repeat(n int) {
	s.w.Repeat(&s.marks[n], s.texts[n])
	s.plain = append(s.plain, s.texts[n]...)
}

// close checks the stream, returns its size and begins another.
func (s *script) close(t testing.TB) int {
	t.Helper()
	s.out = s.w.Close()
	check(t, s.plain, s.out)
	n := len(s.out)
	s.plain = s.plain[:0]
	s.w.Reset(s.out[:0])
	return n
}

// What repeats is a reference for as long as the window reaches it: 32768 bytes, and
// not one more.
func TestRepeatReaches(t *testing.T) {
	text := random(20, 1000, 256)
	for _, c := range []struct{ between, most int }{
		{0, 1100},
		{1, 1100},
		{window - len(text) - 1, window + 150},
		{window - len(text), window + 150},
		{window - len(text) + 1, window + 1150},
		{2 * window, 2*window + 2100},
	} {
		s := newScript(text)
		s.repeat(0)
		s.write(random(21, c.between, 256))
		s.repeat(0)
		if n := s.close(t); n > c.most {
			t.Errorf("%d bytes between: %d bytes; want %d at most", c.between, n, c.most)
		} else {
			t.Logf("%d bytes between: %d bytes", c.between, n)
		}
	}
}

// Every length of a repeat is made of matches that the format has: 3 to 258 bytes.
func TestRepeatLengths(t *testing.T) {
	s := newScript(nil)
	for n := 1; n <= 1100; n++ {
		s.texts[0] = random(22, n, 256)
		for i := range 3 {
			s.repeat(0)
			s.write([]byte{byte(i)})
		}
		if size := s.close(t); size > n+n/8+60 {
			t.Fatalf("%d bytes three times: %d", n, size)
		}
	}
}

// Matches are long where they can be, also without end.
func TestRepeatAlone(t *testing.T) {
	s := newScript(random(23, 100, 256), random(24, 50, 256))
	for range 20_000 {
		s.repeat(0)
		s.repeat(1)
	}
	if n := s.close(t); n > 13_000 {
		t.Errorf("%d bytes", n)
	}
}

// A mark of another stream is none, nor one whose slice is another.
func TestMarkIsForgotten(t *testing.T) {
	text := random(25, 1000, 256)
	s := newScript(text)
	for range 3 {
		s.repeat(0)
		s.write([]byte("."))
		s.repeat(0)
		if n := s.close(t); n < len(text) || n > len(text)+100 {
			t.Errorf("%d bytes", n)
		}
	}
	s.repeat(0)
	s.w.Reset(nil) // given up half-way
	s.plain = s.plain[:0]
	s.write([]byte("novel"))
	s.repeat(0)
	s.close(t)
	s.repeat(0)
	s.texts[0] = random(26, 1000, 256)
	s.repeat(0)
	s.repeat(0)
	s.close(t)
	whole := s.texts[0]
	for _, n := range []int{len(whole) / 2, len(whole), len(whole) - 1} { // of the same memory
		s.texts[0] = whole[:n]
		s.repeat(0)
		s.repeat(0)
	}
	other := newScript(s.texts[0])
	other.marks = s.marks
	other.write(make([]byte, 100))
	other.repeat(0)
	other.repeat(0)
	other.close(t)
	s.repeat(0)
	s.write(nil)
	s.w.Repeat(&Mark{}, nil)
	s.close(t)
}

// Whatever is written in whatever order comes back.
func TestRandomOrder(t *testing.T) {
	for seed := range uint64(6) {
		rng := rand.New(rand.NewPCG(seed, 2))
		var texts [][]byte
		for range 1 + rng.IntN(20) {
			texts = append(texts, random(rng.Uint64(), 1+rng.IntN([]int{10, 300, 2000, 40_000}[rng.IntN(4)]), 1+rng.IntN(256)))
		}
		s := newScript(texts...)
		for range 3 {
			line := random(rng.Uint64(), 1+rng.IntN(300), 20)
			for range rng.IntN(150) {
				switch rng.IntN(8) {
				case 0:
					s.write(random(rng.Uint64(), rng.IntN(2000), 1+rng.IntN(256)))
				case 1, 2, 3:
					line[rng.IntN(len(line))] = byte(rng.IntN(20))
					s.write(line)
				default:
					s.repeat(rng.IntN(len(texts)))
				}
			}
			s.close(t)
		}
	}
}

// One Writer makes streams for ever, of which some are given up at any moment, while
// callers forget their texts and make them anew.
func TestManyStreams(t *testing.T) {
	for seed := range uint64(4) {
		rng := rand.New(rand.NewPCG(seed, 3))
		var texts [][]byte
		for range 30 {
			texts = append(texts, random(rng.Uint64(), 1+rng.IntN([]int{40, 1500, window}[rng.IntN(3)]), 2+rng.IntN(255)))
		}
		s := newScript(texts...)
		for range 120 {
			kind, most, n := rng.IntN(4), rng.IntN(1<<(8+rng.IntN(11))), rng.IntN(len(texts))
			for i := 0; len(s.plain) < most; i++ {
				if rng.IntN(10) == 0 {
					n = rng.IntN(len(texts))
				}
				s.repeat(n)
				switch kind {
				case 0: // documents
					s.write(fmt.Appendf(nil, `%d","time":%d,"message":"order %d of %x"`, i*173, i, rng.IntN(1e6), rng.Uint32()))
				case 1: // a few bytes: plain has mostly gaps
					s.write(random(rng.Uint64(), 1+rng.IntN(6), 256))
				case 2: // what was there lately, so that matches are continued
					at := max(0, len(s.plain)-rng.IntN(window))
					s.write(bytes.Clone(s.plain[at:min(at+rng.IntN(2000), len(s.plain))]))
				}
				if rng.IntN(200) == 0 {
					texts[n] = bytes.Clone(texts[n])
				}
			}
			if rng.IntN(5) == 0 {
				s.w.Reset(s.out[:0])
				s.plain = s.plain[:0]
				continue
			}
			s.close(t)
		}
	}
}

// A stream of documents is not larger than the fastest level of others makes it, and
// costs no allocation.
func TestBulk(t *testing.T) {
	for _, c := range corpora {
		parts, plain := bulk(400, c.containers, c.run, c.message)
		w, marks := NewWriter(), make([]Mark, 2+3*c.containers)
		out := feed(w, nil, marks, parts)
		check(t, plain, out)
		if most := len(klauspost(plain)); len(out) > most {
			t.Errorf("%s: %d bytes of %d; want %d at most", c.name, len(out), len(plain), most)
		}
		if n := testing.AllocsPerRun(5, func() { out = feed(w, out[:0], marks, parts) }); n > 0 {
			t.Errorf("%s: %v allocations", c.name, n)
		}
		check(t, plain, out)
	}
}

// FuzzWriter takes its input as a script: what is written, which marks repeat and
// where streams end. The standard library has to read the same.
func FuzzWriter(f *testing.F) {
	f.Add([]byte("\x00\x05hello\x01\x00\x01\x00\x02\x01\x00\x03\xff\x00\x03abc"))
	f.Add([]byte("\x01\x07\x01\x06\x01\x07\x03\x10\x01\x07\x04\x40\x01\x06"))
	f.Add([]byte("\x05\x01\x05\x02\x05\x01\x01\x03\x05\x01\x02\x02\x05\x07"))
	var texts [][]byte
	for n := range 16 {
		texts = append(texts, random(uint64(n), []int{1, 7, 8, 9, 31, 32, 33, 257, 258, 259, 260, 516, 1000, 5000, window, window + 1}[n], 4+n*16))
	}
	s := newScript(texts...)
	f.Fuzz(func(t *testing.T, ops []byte) {
		line := bytes.Clone(texts[12][:200])
		for len(ops) >= 2 {
			op, x := ops[0], int(ops[1])
			ops = ops[2:]
			switch op % 6 {
			case 0:
				n := min(x, len(ops))
				s.write(ops[:n])
				ops = ops[n:]
			case 1:
				s.repeat(x % len(texts))
			case 2:
				s.close(t)
			case 3:
				s.write(bytes.Repeat([]byte{byte(x)}, 100*x))
			case 4:
				s.write(random(uint64(x), 300*x, 256))
			case 5:
				line[x%len(line)]++
				s.write(line)
			}
			if len(s.plain) > 4<<20 {
				break
			}
		}
		s.close(t)
	})
}
