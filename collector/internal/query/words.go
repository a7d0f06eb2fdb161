package query

import (
	"slices"
	"unicode"
	"unicode/utf8"
)

// A word is a run of letters, digits and marks, in lower case. Everything else
// separates: punctuation, underscores, control characters. So card_declined and
// card-declined hold the words card and declined, and a trace id is one word.

func inWord(r rune) bool {
	if r < utf8.RuneSelf {
		return 'a' <= r && r <= 'z' || '0' <= r && r <= '9' || 'A' <= r && r <= 'Z'
	}
	return r != utf8.RuneError && (unicode.IsLetter(r) || unicode.IsNumber(r) || unicode.IsMark(r))
}

// eachWord calls f with the words of a text that is in lower case already, until
// f returns false.
func eachWord(lower string, f func(string) bool) {
	start := -1
	for i, r := range lower {
		switch {
		case inWord(r):
			if start < 0 {
				start = i
			}
		case start >= 0:
			if !f(lower[start:i]) {
				return
			}
			start = -1
		}
	}
	if start >= 0 {
		f(lower[start:])
	}
}

// words splits a pattern in lower case into one pattern a word, in which an
// asterisk counts as a letter.
func (p Pattern) words() []Pattern {
	var out []Pattern
	var word Pattern // nil between words
	for i, part := range p {
		if i > 0 { // the asterisk before this part
			if word == nil {
				word = Pattern{""}
			}
			word = append(word, "")
		}
		for _, r := range part {
			if !inWord(r) {
				if word != nil {
					out, word = append(out, word), nil
				}
				continue
			}
			if word == nil {
				word = Pattern{""}
			}
			word[len(word)-1] += string(r)
		}
	}
	if word != nil {
		out = append(out, word)
	}
	return out
}

// phraseIn reports whether words that match the patterns follow one another in
// the text, which is in lower case.
func phraseIn(patterns []Pattern, lower string) bool {
	window := make([]string, 0, len(patterns)) // the last words read
	found := false
	eachWord(lower, func(w string) bool {
		if len(window) == len(patterns) {
			window = slices.Delete(window, 0, 1)
		}
		window = append(window, w)
		if len(window) < len(patterns) {
			return true
		}
		for i, p := range patterns {
			if !p.glob(window[i]) {
				return true
			}
		}
		found = true
		return false
	})
	return found
}
