package cost

import (
	"cmp"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"
)

const (
	maxRead    = 512 // bytes of a line that are compared
	maxTokens  = 40  // words of a line that are compared
	maxExample = 512 // bytes
	maxExact   = 128 // lines whose template is known without comparing
	// similar is the share of words that lines of one template have in common.
	similar = 0.6
	wild    = "<*>"
)

// drain finds the templates of one workload's lines, after P. He and others,
// "Drain: An Online Log Parsing Approach with Fixed Depth Tree" (ICWS 2017):
// numbers are taken out of a line, then it is compared with the templates that
// have as many words and the same first one.
type drain struct {
	mu     sync.Mutex
	n      int
	leaves map[leaf][]*template
	exact  map[uint64]*template // by the hash of a line without its numbers
	rest   template
}

type leaf struct {
	words int
	first string
}

type template struct {
	words              []string
	example            string
	cut                bool // lines go on behind the words
	lines, bytes, kept int64
}

// add counts a line; total is the number of templates of all workloads.
func (d *drain) add(body string, lines, bytes int64, dropped bool, total *atomic.Int64) {
	var room [maxRead + 64]byte
	masked, cut := mask(room[:0], body)
	h := uint64(14695981039346656037)
	for _, c := range masked {
		h = (h ^ uint64(c)) * 1099511628211
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	t := d.exact[h]
	if t == nil {
		t = d.find(string(masked), body, cut, total)
		if len(d.exact) >= maxExact {
			clear(d.exact)
		}
		if d.exact == nil {
			d.exact = map[uint64]*template{}
		}
		d.exact[h] = t
	}
	t.lines += lines
	t.bytes += bytes
	if !dropped {
		t.kept += bytes
	}
}

// find returns the template of a line, or the rest where there is no room for
// another.
func (d *drain) find(masked, body string, cut bool, total *atomic.Int64) *template {
	words := strings.Fields(masked)
	if len(words) > maxTokens {
		words, cut = words[:maxTokens], true
	}
	at := leaf{words: len(words)}
	if len(words) > 0 {
		at.first = words[0]
	}
	var best *template
	most := -1.0
	for _, t := range d.leaves[at] {
		same := 0
		for i, w := range words {
			if t.words[i] == w {
				same++
			}
		}
		if s := float64(same) / float64(max(len(words), 1)); s > most {
			best, most = t, s
		}
	}
	if best != nil && most >= similar || best != nil && len(words) == 0 {
		for i, w := range words {
			if best.words[i] != w {
				best.words[i] = wild
			}
		}
		best.cut = best.cut || cut
		return best
	}
	if d.n >= maxOfRow || total.Add(1) > MaxTemplates {
		if d.n < maxOfRow {
			total.Add(-1)
		}
		return &d.rest
	}
	d.n++
	t := &template{words: words, cut: cut, example: strings.Clone(cutAt(body, maxExample))}
	if d.leaves == nil {
		d.leaves = map[leaf][]*template{}
	}
	d.leaves[at] = append(d.leaves[at], t)
	return t
}

// mask writes the first line of a body, with a wildcard for each word that has
// a digit: numbers, addresses, times, ids. A word is of letters, digits, dots,
// hyphens, underscores, and colons between digits.
func mask(b []byte, body string) (masked []byte, cut bool) {
	s := cutAt(body, maxRead)
	if i := strings.IndexByte(s, '\n'); i >= 0 {
		s = s[:i]
	}
	for i := 0; i < len(s); {
		from, digit := i, false
		for i < len(s) {
			c := s[i]
			if '0' <= c && c <= '9' {
				digit = true
			} else if !wordByte(c) && !(c == ':' && digit && i+1 < len(s) && '0' <= s[i+1] && s[i+1] <= '9') {
				break
			}
			i++
		}
		switch {
		case digit:
			b = append(b, wild...)
		default:
			b = append(b, s[from:i]...)
		}
		if i < len(s) {
			b = append(b, s[i])
			i++
		}
	}
	return b, len(s) < len(body)
}

func wordByte(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || c == '.' || c == '-' || c == '_'
}

func cutAt(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

// top returns the templates with the most bytes, over a time.
func (d *drain) top(over time.Duration) []Template {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := []*template{}
	for _, l := range d.leaves {
		all = append(all, l...)
	}
	slices.SortFunc(all, func(a, b *template) int {
		return cmp.Or(cmp.Compare(b.bytes, a.bytes), slices.Compare(a.words, b.words))
	})
	out := []Template{}
	for _, t := range all[:min(len(all), TopTemplates)] {
		out = append(out, Template{
			Pattern: strings.Join(t.words, " "), Example: t.example, Match: t.match(), Lines: t.lines, Bytes: t.bytes, WouldSave: perDay(t.kept, over),
		})
	}
	rest := d.rest
	for _, t := range all[len(out):] {
		rest.lines += t.lines
		rest.bytes += t.bytes
		rest.kept += t.kept
	}
	if rest.lines > 0 {
		out = append(out, Template{Pattern: Rest, Lines: rest.lines, Bytes: rest.bytes, WouldSave: perDay(rest.kept, over)})
	}
	return out
}

func perDay(bytes int64, over time.Duration) int64 {
	if over <= 0 {
		return 0
	}
	return int64(float64(bytes) / over.Seconds() * (24 * 60 * 60))
}

// match is the template as a regular expression.
func (t *template) match() string {
	var b strings.Builder
	b.WriteByte('^')
	for i, w := range t.words {
		if i == 0 {
			b.WriteString(`\s*`)
		} else {
			b.WriteString(`\s+`)
		}
		for j, part := range strings.Split(w, wild) {
			if j > 0 {
				b.WriteString(`\S+`)
			}
			b.WriteString(regexp.QuoteMeta(part))
		}
	}
	if !t.cut {
		b.WriteString(`\s*$`)
	}
	return b.String()
}
