package rules

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

// DefaultRedaction is what stands for a secret.
const DefaultRedaction = "[redacted]"

// finder returns the first secret of its kind at or behind from, or -1.
type finder func(s string, from int) (start, end int)

var finders = map[string]finder{"card": card, "email": email, "token": token, "ip": address, "iban": iban}

// redactor replaces secrets. It is not changed by use.
type redactor struct {
	finders []finder
	cards   bool // numbers may be cards too
	res     []*regexp.Regexp
	with    string
}

func (c *Redact) compile(bad complain) *redactor {
	rd := &redactor{with: c.With}
	if rd.with == "" {
		rd.with = DefaultRedaction
	}
	if len(c.Kinds)+len(c.Patterns) == 0 || len(c.Kinds)+len(c.Patterns) > MaxPatterns {
		bad("redact", len(c.Kinds)+len(c.Patterns), fmt.Sprintf("write 1 to %d kinds and patterns", MaxPatterns))
	}
	for _, kind := range c.Kinds {
		if !rd.add(kind) {
			bad("redact.kinds", kind, "write card, email, token, ip or iban")
		}
	}
	for _, p := range c.Patterns {
		re := expression("redact.patterns", p, bad)
		if re != nil && re.MatchString("") {
			bad("redact.patterns", fmt.Sprintf("%q", p), "it matches nothing at all, and so everywhere; make it match something")
		}
		rd.res = append(rd.res, re)
	}
	return rd
}

// kindOrder is that in which kinds are looked for: the longer secrets first,
// since they may hold others.
var kindOrder = []string{"token", "email", "iban", "card", "ip"}

func (rd *redactor) add(kind string) bool {
	f := finders[kind]
	if f == nil {
		return false
	}
	rd.cards = rd.cards || kind == "card"
	rd.finders = append(rd.finders, f)
	return true
}

// record redacts the body and all values of text, and reports how many secrets
// there were.
func (rd *redactor) record(r *record.Record) (n int) {
	r.Body = rd.text(r.Body, &n)
	r.Service = rd.text(r.Service, &n)
	for name, v := range r.Attributes {
		if now, changed := rd.value(v, &n); changed {
			r.Attributes[name] = now
		}
	}
	return n
}

func (rd *redactor) value(v any, n *int) (now any, changed bool) {
	switch v := v.(type) {
	case string:
		before := *n
		s := rd.text(v, n)
		return s, *n != before
	case float64:
		if !rd.cards || v < 1e12 || v >= 1e19 {
			return v, false
		}
		if s := strconv.FormatFloat(v, 'f', -1, 64); cardNumber(s) {
			*n++
			return rd.with, true
		}
	case []any:
		for i, x := range v {
			if now, changed := rd.value(x, n); changed {
				v[i] = now
			}
		}
	case map[string]any:
		for k, x := range v {
			if now, changed := rd.value(x, n); changed {
				v[k] = now
			}
		}
	}
	return v, false
}

// text is s without secrets; it allocates only if there is one.
func (rd *redactor) text(s string, n *int) string {
	if len(s) < 4 && len(rd.res) == 0 {
		return s
	}
	for _, find := range rd.finders {
		s = rd.replace(s, find, n)
	}
	for _, re := range rd.res {
		s = rd.replace(s, func(s string, from int) (start, end int) {
			at := re.FindStringIndex(s[from:])
			if at == nil || at[0] == at[1] {
				return -1, -1
			}
			return from + at[0], from + at[1]
		}, n)
	}
	return s
}

func (rd *redactor) replace(s string, find finder, n *int) string {
	start, end := find(s, 0)
	if start < 0 {
		return s
	}
	var b strings.Builder
	from := 0
	for start >= 0 {
		*n++
		b.WriteString(s[from:start])
		b.WriteString(rd.with)
		from = end
		start, end = find(s, from)
	}
	b.WriteString(s[from:])
	return b.String()
}

const (
	isDigit = 1 << iota
	isUpper
	isLower
	isTokenSign // - . _ ~ + / =
	isMailSign  // . _ % + -
	isTokenStart
)

var classes = func() (c [256]uint8) {
	for i := '0'; i <= '9'; i++ {
		c[i] |= isDigit
	}
	for i := 'A'; i <= 'Z'; i++ {
		c[i] |= isUpper
		c[i+'a'-'A'] |= isLower
	}
	for _, b := range []byte("-._~+/=") {
		c[b] |= isTokenSign
	}
	for _, b := range []byte("._%+-") {
		c[b] |= isMailSign
	}
	for _, b := range []byte("eBb-Agxsrn") {
		c[b] |= isTokenStart
	}
	return c
}()

const (
	alnum     = isDigit | isUpper | isLower
	tokenByte = alnum | isTokenSign
	mailByte  = alnum | isMailSign
)

func run(s string, from int, class uint8) int {
	for from < len(s) && classes[s[from]]&class != 0 {
		from++
	}
	return from
}

// wordStart reports whether no letter or digit stands before i.
func wordStart(s string, i int) bool { return i == 0 || classes[s[i-1]]&alnum == 0 }

// card finds a number of a payment card: 13 to 19 digits in one piece, or in
// groups of four (of 4, 6 and 5 for 15 digits) with spaces or hyphens between,
// which begins as cards do and has the check digit of ISO/IEC 7812 (Luhn).
func card(s string, from int) (start, end int) {
	for i := from; i < len(s); {
		c := s[i]
		if classes[c]&isDigit == 0 {
			i++
			continue
		}
		whole := run(s, i, isDigit)
		if c < '2' || c > '6' || !wordStart(s, i) || i > 0 && (s[i-1] == '.' || s[i-1] == '_') {
			i = whole
			continue
		}
		if whole-i >= 13 {
			if (whole == len(s) || classes[s[whole]]&alnum == 0 && s[whole] != '_') && cardNumber(s[i:whole]) {
				return i, whole
			}
			i = whole
			continue
		}
		if whole-i == 4 && whole < len(s) && (s[whole] == ' ' || s[whole] == '-') {
			if e := grouped(s, i, s[whole]); e > 0 {
				return i, e
			}
		}
		i = whole
	}
	return -1, -1
}

// grouped reads a card's number in groups, and returns its end or 0.
func grouped(s string, from int, separator byte) (end int) {
	var digits [19]byte
	n, groups := 0, [5]int{}
	for g := range groups {
		stop := run(s, from, isDigit)
		if stop-from == 0 || n+stop-from > len(digits) {
			break
		}
		n += copy(digits[n:], s[from:stop])
		groups[g] = stop - from
		clear := stop == len(s) || classes[s[stop]]&alnum == 0
		shape := g == 2 && groups[1] == 6 && groups[2] == 5 || g >= 3 && groups[1] == 4 && groups[2] == 4 && (groups[3] == 4 || g == 3)
		if clear && shape && n >= 13 && cardNumber(string(digits[:n])) {
			end = stop
		}
		if stop == len(s) || s[stop] != separator {
			break
		}
		from = stop + 1
	}
	return end
}

// brand reports whether a number begins as those of its length do: Mastercard,
// American Express, Diners Club, JCB, Visa, Maestro, Discover, UnionPay. It keeps
// dates of 14 digits from being cards.
func brand(digits string) bool {
	n := len(digits)
	if n < 13 || n > 19 {
		return false
	}
	switch two := digits[:2]; digits[0] {
	case '2':
		return n == 16 && "2221" <= digits[:4] && digits[:4] <= "2720"
	case '3':
		return n == 15 && (two == "34" || two == "37") || n == 14 && (two == "30" || two == "36" || two >= "38") || n >= 16 && two == "35"
	case '4':
		return n == 13 || n == 16 || n == 19
	case '5':
		return n == 16 && "51" <= two && two <= "55" || two == "50" || "56" <= two && two <= "58"
	case '6':
		return n >= 16
	}
	return false
}

func cardNumber(digits string) bool {
	if !brand(digits) {
		return false
	}
	sum := 0
	for i := range len(digits) {
		d := int(digits[len(digits)-1-i] - '0')
		if d > 9 {
			return false
		}
		if i%2 == 1 {
			if d *= 2; d > 9 {
				d -= 9
			}
		}
		sum += d
	}
	return sum%10 == 0
}

// email finds an address of the usual form, without quotes and comments.
func email(s string, from int) (start, end int) {
	for i := from; ; {
		n := strings.IndexByte(s[i:], '@')
		if n < 0 {
			return -1, -1
		}
		at := i + n
		i = at + 1
		start := at
		for start > from && at-start < 64 && classes[s[start-1]]&mailByte != 0 {
			start--
		}
		end := at + 1
		for end < len(s) && end-at < 255 && (classes[s[end]]&alnum != 0 || s[end] == '.' || s[end] == '-') {
			end++
		}
		for end > at && (s[end-1] == '.' || s[end-1] == '-') {
			end--
		}
		dot := strings.LastIndexByte(s[at:end], '.')
		if start == at || dot < 2 || at+dot+3 > end || run(s[:end], at+dot+1, isUpper|isLower) != end {
			continue
		}
		return start, end
	}
}

// prefixes of tokens that say what they are, and how many bytes follow at least.
var prefixes = [...]struct {
	text string
	more int
}{
	{"AKIA", 16},
	{"ASIA", 16},
	{"ghp_", 20},
	{"gho_", 20},
	{"ghs_", 20},
	{"ghu_", 20},
	{"github_pat_", 20},
	{"glpat-", 16},
	{"xoxb-", 16},
	{"xoxp-", 16},
	{"xoxa-", 16},
	{"sk_live_", 16},
	{"rk_live_", 16},
	{"AIza", 30},
	{"npm_", 30},
}

// token finds JSON Web Tokens (RFC 7519), bearer tokens (RFC 6750), keys of AWS,
// GitHub, GitLab, Slack, Stripe, Google and npm, and blocks of private keys
// (RFC 7468). Of a block that is cut off all that is left is one.
func token(s string, from int) (start, end int) {
	within := from > 0 && classes[s[from-1]]&alnum != 0
	for i := from; i < len(s); i++ {
		c := classes[s[i]]
		starts := !within && c&isTokenStart != 0
		within = c&alnum != 0
		if !starts {
			continue
		}
		switch s[i] {
		case 'e':
			if strings.HasPrefix(s[i:], "eyJ") {
				if end := jwt(s, i); end > 0 {
					return i, end
				}
			}
		case 'B', 'b':
			if strings.HasPrefix(s[i+1:], "earer ") {
				from := i + len("Bearer ")
				if end := run(s, from, tokenByte); end-from >= 8 {
					return from, end
				}
			}
		case '-':
			if strings.HasPrefix(s[i:], "-----BEGIN ") {
				if end := keyBlock(s, i); end > 0 {
					return i, end
				}
			}
		default:
			for _, p := range prefixes {
				if !strings.HasPrefix(s[i:], p.text) {
					continue
				}
				end := i + len(p.text)
				for end < len(s) && (classes[s[end]]&alnum != 0 || s[end] == '_' || s[end] == '-') {
					end++
				}
				if end-i-len(p.text) >= p.more {
					return i, end
				}
			}
		}
	}
	return -1, -1
}

func jwt(s string, i int) (end int) {
	part := func() bool {
		from := end
		for end < len(s) && (classes[s[end]]&alnum != 0 || s[end] == '-' || s[end] == '_') {
			end++
		}
		return end-from >= 10
	}
	end = i
	if !part() || end == len(s) || s[end] != '.' {
		return 0
	}
	end++
	if !part() {
		return 0
	}
	for end < len(s) && (classes[s[end]]&alnum != 0 || s[end] == '-' || s[end] == '_' || s[end] == '.') {
		end++
	}
	return end
}

func keyBlock(s string, i int) int {
	head := s[i:min(len(s), i+64)]
	if !strings.Contains(head, "PRIVATE KEY-----") {
		return 0
	}
	_, rest, ok := strings.Cut(s[i:], "-----END ")
	if !ok {
		return len(s)
	}
	n := strings.Index(rest, "-----")
	if n < 0 {
		return len(s)
	}
	return len(s) - len(rest) + n + len("-----")
}

// address finds IPv4 and IPv6 addresses.
func address(s string, from int) (start, end int) {
	for i := from; i < len(s); {
		c := s[i]
		hex := classes[c]&isDigit != 0 || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F'
		if !hex && c != ':' || !wordStart(s, i) {
			i++
			continue
		}
		end := i
		dots, colons := 0, 0
	word:
		for ; end < len(s); end++ {
			switch c := s[end]; {
			case c == '.':
				dots++
			case c == ':':
				colons++
			case classes[c]&alnum == 0:
				break word
			}
		}
		if word, at := s[i:end], i; dots >= 3 || colons >= 2 {
			i = end
			word = strings.TrimRight(word, ".:")
			if colons == 1 { // a port
				word, _, _ = strings.Cut(word, ":")
			}
			if _, err := netip.ParseAddr(word); err == nil && len(word) > len("::") {
				return at, at + len(word)
			}
			if strings.HasSuffix(s[at:end], "::") {
				if _, err := netip.ParseAddr(word + "::"); err == nil {
					return at, at + len(word) + 2
				}
			}
		}
		i = max(end, i+1)
	}
	return -1, -1
}

// iban finds an account's number (ISO 13616), in one piece or in groups of four,
// whose check digits are right.
func iban(s string, from int) (start, end int) {
	for i := from; i+15 <= len(s); i++ {
		if classes[s[i+1]]&isUpper == 0 || classes[s[i+2]]&isDigit == 0 || classes[s[i]]&isUpper == 0 || classes[s[i+3]]&isDigit == 0 || !wordStart(s, i) {
			continue
		}
		var b [34]byte
		n, best := 0, 0
		for j := i; j < len(s) && n < len(b); j++ {
			c := s[j]
			if c == ' ' && n%4 == 0 && n > 0 && s[j-1] != ' ' {
				continue
			}
			if classes[c]&(isUpper|isDigit) == 0 {
				break
			}
			b[n] = c
			n++
			if n >= 15 && (j+1 == len(s) || classes[s[j+1]]&alnum == 0) && mod97(b[:n]) == 1 {
				best = j + 1
			}
		}
		if best > 0 {
			return i, best
		}
	}
	return -1, -1
}

func mod97(b []byte) int {
	m := 0
	for i := range b {
		c := b[(i+4)%len(b)] // the first four go to the end
		if classes[c]&isDigit != 0 {
			m = (m*10 + int(c-'0')) % 97
		} else {
			m = (m*100 + int(c-'A') + 10) % 97
		}
	}
	return m
}

// kindsOf makes a redactor of an annotation's list.
func kindsOf(list []string) (rd *redactor, unknown []string) {
	rd = &redactor{with: DefaultRedaction}
	for _, kind := range list {
		if finders[kind] == nil && kind != "all" {
			unknown = append(unknown, kind)
		}
	}
	for _, kind := range kindOrder {
		if slices.Contains(list, kind) || slices.Contains(list, "all") {
			rd.add(kind)
		}
	}
	return rd, unknown
}
