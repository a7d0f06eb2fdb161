package multiline

import "bytes"

// state is what the lines of a record so far are.
type state uint8

const (
	none      state = iota
	last            // only of step: the line joins, and nothing follows it
	begun           // a pattern's record
	logged          // a log line of a level at which traces follow
	raised          // the name of an exception, no frame yet
	traced          // frames of the JVM, .NET or Node
	goPanic         // a crash or dump of Go
	goRaceBar       // the bar above a report of the race detector
	goRace          // such a report
	zapStack        // functions and files below a line of zap
	pyTrace         // a Traceback, of Python or old Ruby
	pyRaised        // the exception that ends it
	pyChained       // the sentence that another follows
	rubyTrace
	rustPanic // the message is on the next line
	rustTrace // behind the message
	phpTrace
	nodeSource  // the place in the source, which Node prints above an exception
	dotnetEntry // .NET's console logger: a line of category, then indented text
)

// What a byte at the start of a line can mean.
const (
	plain = iota
	letter
	dated  // a digit, a bracket or an escape sequence: what log lines begin with
	indent // space or tab
	other  // see headOther
)

// first is what a line's first byte can mean; ident holds what names of classes
// are made of.
var first, ident = tables()

func tables() (first [256]uint8, ident [256]bool) {
	for c := range 256 {
		switch b := byte(c); {
		case 'a' <= b && b <= 'z', 'A' <= b && b <= 'Z':
			first[c], ident[c] = letter, true
		case '0' <= b && b <= '9':
			first[c], ident[c] = dated, true
		}
	}
	for _, c := range []byte("_.$\\") {
		ident[c] = true
	}
	first['['], first[0x1b] = dated, dated
	first['_'] = letter
	first[' '], first['\t'] = indent, indent
	for _, c := range []byte(`="/(.`) {
		first[c] = other
	}
	return first, ident
}

const (
	// maxWord is how long the name of a class may be.
	maxWord = 200
	// levelWithin is where a log line states its level.
	levelWithin = 80
	// placeWithin is where a frame of Ruby names its line.
	placeWithin = 256
)

// head says what a line may be the beginning of.
func (l *Language) head(text []byte) state {
	if len(text) == 0 || l.langs == 0 {
		return none
	}
	switch first[text[0]] {
	case letter:
		return l.headWord(text)
	case dated:
		return l.headDated(text)
	case indent:
		return l.frame(text)
	case other:
		return l.headOther(chomp(text))
	default:
		return none
	}
}

func (l *Language) only(need languages, s state) state {
	if l.langs&need == 0 {
		return none
	}
	return s
}

// headDated is for lines that begin with a date: of a level at which an
// exception may be on the next line, or of net/http's recovered panics.
func (l *Language) headDated(text []byte) state {
	head := text[:min(len(text), levelWithin)]
	if len(head) < len("12:00:00") || !stamped(head) {
		return none
	}
	if severe(head) {
		return logged
	}
	if text[0] == '[' {
		if i := bytes.IndexByte(head, ']'); i > 0 && has(text[i:], "] PHP ") {
			return l.only(php, uncaught(text[i+len("] "):]))
		}
		return none
	}
	if len(text) > 20 && text[4] == '/' && (has(text[20:], "http: panic") || has(text[20:], "panic: ")) {
		return l.only(golang, goPanic)
	}
	return none
}

// stamped reports whether a line begins with a date or a time, or with what often
// stands around one. It tells an access log's addresses apart at small cost.
func stamped(head []byte) bool {
	if head[0] < '0' || head[0] > '9' {
		return true // a bracket or a colour
	}
	switch head[2] {
	case ':', '-', '/', ' ':
		return true
	case '.':
		return head[5] == '.'
	}
	return head[4] == '-' || head[4] == '/'
}

// severe finds ERROR, WARN, CRITICAL, SEVERE or FATAL, or what Serilog makes of
// them. All but the last have an R, which other log lines seldom have.
func severe(head []byte) bool {
	for i := 0; ; i++ {
		n := bytes.IndexByte(head[i:], 'R')
		if n < 0 {
			break
		}
		i += n
		if i >= 1 && (has(head[i-1:], "ERROR") || has(head[i-1:], "CRITICAL") || has(head[i-1:], "ERR]") || has(head[i-1:], "WRN]")) || i >= 2 && has(head[i-2:], "WARN") || i >= 4 && has(head[i-4:], "SEVERE") {
			return true
		}
	}
	i := bytes.IndexByte(head, 'F')
	return i >= 0 && (has(head[i:], "FATAL") || has(head[i:], "FTL]"))
}

// headWord is for lines that begin with a letter.
func (l *Language) headWord(text []byte) state {
	i := 1
	for n := min(len(text), maxWord); i < n && ident[text[i]]; i++ {
	}
	word, rest := text[:i], text[i:]
	if exception(word, rest) {
		return l.only(java|dotnet|node|php|ruby, raised)
	}
	switch text[0] {
	case 'p':
		if has(text, "panic: ") {
			return l.only(golang, goPanic)
		}
	case 'g':
		if goroutine(text) {
			return l.only(golang, goPanic)
		}
	case 'f':
		switch {
		case has(text, "fatal error: "):
			return l.only(golang, goPanic)
		case has(text, "file:///"):
			return l.source(text)
		}
	case 'u':
		if has(text, "unexpected fault address ") {
			return l.only(golang, goPanic)
		}
	case 'r':
		if has(text, "runtime: ") {
			return l.only(golang, goPanic)
		}
	case 'n':
		if has(text, "node:internal/") {
			return l.source(text)
		}
	case 't':
		if has(text, "thread '") && bytes.Contains(text, []byte("' panicked at ")) {
			if bytes.HasSuffix(chomp(text), []byte{':'}) {
				return l.only(rust, rustPanic)
			}
			return l.only(rust, rustTrace)
		}
	case 'T':
		if has(text, "Traceback (most recent call last)") {
			return l.only(python|ruby, pyTrace)
		}
	case 'U':
		if has(text, "Unhandled exception") || has(text, "Uncaught ") {
			return l.only(dotnet|node|java, raised)
		}
	case 'N':
		if has(text, "NOTICE: PHP message: PHP ") {
			return l.only(php, uncaught(text[len("NOTICE: PHP message: "):]))
		}
	case 'P':
		if has(text, "PHP ") {
			return l.only(php, uncaught(text))
		}
	case 'E':
		if has(text, "Exception in thread ") || has(text, "Exception ignored in") {
			return l.only(java|python, raised)
		}
		if has(text, "ERROR") || has(text, "E, [") || klog(text) {
			return logged
		}
	case 'C':
		switch {
		case has(text, "Caused by: "):
			return l.only(java|php, traced)
		case has(text, "CRITICAL"):
			return logged
		}
	case 'F':
		if s := uncaught(text); s != none {
			return l.only(php, s)
		}
		if has(text, "FATAL") || has(text, "F, [") || klog(text) {
			return logged
		}
	case 'S':
		switch {
		case has(text, "SEVERE"):
			return logged
		case has(text, "SIG") && len(rest) > 0 && rest[0] == ':':
			return l.only(golang, goPanic)
		}
	case 'W':
		switch {
		case has(text, "WARNING: DATA RACE"):
			return l.only(golang, goRace)
		case has(text, "WARN"):
			return logged
		}
	}
	if len(rest) == 0 {
		return none
	}
	switch rest[0] {
	case ':':
		if len(word) == 4 && entry(word, text) {
			return l.only(dotnet, dotnetEntry)
		}
		fallthrough
	case '/', '-':
		if l.langs&ruby != 0 && rubyFrame(text) {
			return rubyTrace
		}
	}
	return none
}

// entry reports whether a line is the first of two of .NET's console logger,
// such as "info: Microsoft.Hosting.Lifetime[14]".
func entry(word, text []byte) bool {
	switch string(word) {
	case "trce", "dbug", "info", "warn", "fail", "crit":
		text = chomp(text)
		return text[len(text)-1] == ']' && bytes.IndexByte(text[len("info: "):], ' ') < 0
	}
	return false
}

// exception reports whether a line begins with the name of an exception, and
// rest is what may follow one: its message, its code, or nothing.
func exception(word, rest []byte) bool {
	if len(rest) > 0 {
		switch rest[0] {
		case ':', '\r':
		case ' ':
			if len(rest) < 2 || rest[1] != '[' && rest[1] != '(' { // Node's code, Rails' message
				return false
			}
		default:
			return false
		}
	}
	var suffix string
	switch word[len(word)-1] {
	case 'n':
		suffix = "Exception"
	case 'r':
		suffix = "Error"
	case 't':
		suffix = "Fault"
	case 'e':
		if bytes.HasSuffix(word, []byte("Throwable")) {
			return true
		}
		suffix = "Failure"
	default:
		return false
	}
	return bytes.HasSuffix(word, []byte(suffix))
}

// headOther is for what begins with a sign.
func (l *Language) headOther(text []byte) state {
	switch text[0] {
	case '=':
		if bar(text) {
			return l.only(golang, goRaceBar)
		}
	case '"': // a thread of a JVM's dump
		if i := bytes.Index(text, []byte(`" #`)); i > 0 && bytes.Contains(text[i:], []byte(" prio=")) {
			return l.only(java, raised)
		}
	case '(':
		if has(text, "(node:") {
			return l.only(node, raised)
		}
	case '/', '.':
		if l.langs&ruby != 0 && rubyFrame(text) {
			return rubyTrace
		}
		return l.source(text)
	}
	return none
}

// source reads what Node prints first: a file and a line, such as /app/a.js:10.
func (l *Language) source(text []byte) state {
	text = chomp(text)
	colon := bytes.LastIndexByte(text, ':')
	if l.langs&node == 0 || colon < 0 || !digits(text[colon+1:]) || bytes.IndexByte(text, ' ') >= 0 {
		return none
	}
	file := text[:colon]
	for _, ext := range [...]string{".js", ".mjs", ".cjs", ".ts"} {
		if bytes.HasSuffix(file, []byte(ext)) {
			return nodeSource
		}
	}
	if has(file, "node:") {
		return nodeSource
	}
	return none
}

// frame says which trace an indented line can only be a part of.
func (l *Language) frame(text []byte) state {
	t := unindented(text)
	if len(t) == 0 || len(t) == len(text) {
		return none
	}
	switch t[0] {
	case 'a':
		if has(t, "at ") && (bytes.IndexByte(t, '(') > 0 || bytes.IndexByte(t, ':') > 0) {
			return l.only(java|dotnet|node, traced)
		}
	case '.':
		if has(t, "... ") && (bytes.HasSuffix(chomp(t), []byte(" more")) || bytes.Contains(t, []byte("common frames omitted"))) {
			return l.only(java, traced)
		}
	case '-':
		if has(t, "---> ") || has(t, "--- End of ") {
			return l.only(dotnet, traced)
		}
	case 'F':
		if has(t, `File "`) {
			return l.only(python, pyTrace)
		}
	case 'f':
		if has(t, "from ") && bytes.Contains(t, []byte(":in ")) {
			return l.only(ruby, rubyTrace)
		}
	case '+':
		if has(t, "+ Exception Group Traceback") {
			return l.only(python, pyRaised)
		}
	}
	return none
}

// step says what a record in state s becomes by a line, or none where the line
// does not belong to it.
func (l *Language) step(s state, text []byte) state {
	if len(unindented(text)) == 0 {
		switch s {
		case logged, rustTrace, dotnetEntry, zapStack, goRaceBar:
			return none
		case rustPanic:
			return rustTrace
		default:
			return s
		}
	}
	if text[0] == ' ' || text[0] == '\t' {
		switch s {
		case logged:
			return l.frame(text)
		case goRaceBar:
			return none
		case raised:
			return traced
		case rustPanic:
			return rustTrace
		default:
			return s
		}
	}
	switch s {
	case logged:
		return l.stepLogged(text)
	case raised, traced:
		return l.stepTraced(s, text)
	case goPanic:
		return stepGo(text)
	case goRaceBar:
		if has(text, "WARNING: DATA RACE") {
			return goRace
		}
	case goRace:
		return stepRace(text)
	case zapStack:
		if goName(text) {
			return zapStack
		}
	case pyTrace:
		if l.langs&ruby != 0 && rubyFrame(text) {
			return rubyTrace
		}
		if pyException(text) {
			return pyRaised
		}
	case pyRaised:
		if has(text, "During handling of the above exception") || has(text, "The above exception was the direct cause") {
			return pyChained
		}
	case pyChained:
		if has(text, "Traceback (most recent call last)") {
			return pyTrace
		}
	case rubyTrace:
		if rubyFrame(text) || has(text, "Caused by:") || has(text, "Cause:") {
			return rubyTrace
		}
	case rustPanic:
		return rustTrace
	case rustTrace:
		if has(text, "stack backtrace:") || has(text, "note: ") {
			return rustTrace
		}
	case phpTrace:
		if phpPart(text) {
			return phpTrace
		}
	case nodeSource:
		switch h := l.head(text); {
		case h == raised:
			return raised
		case has(text, "Node.js v"):
			return last
		case text[0] == '^':
			return nodeSource
		}
		// The statement may begin in the first column.
		if bytes.HasSuffix(text, []byte{';'}) || has(text, "throw ") {
			return nodeSource
		}
	default:
	}
	return none
}

// stepLogged is for what follows a log line without indentation.
func (l *Language) stepLogged(text []byte) state {
	switch h := l.head(text); h {
	case raised, traced, goPanic, pyTrace, rubyTrace, rustPanic, rustTrace, phpTrace:
		return h
	default:
	}
	if l.langs&php != 0 && phpPart(text) {
		return phpTrace
	}
	if l.langs&golang != 0 && goName(text) {
		return zapStack
	}
	return none
}

func (l *Language) stepTraced(s state, text []byte) state {
	switch text[0] {
	case 'C':
		if has(text, "Caused by:") {
			return traced
		}
	case 'S':
		if has(text, "Suppressed: ") || has(text, "Stack trace:") {
			return traced
		}
	case 'W':
		if has(text, "Wrapped by: ") {
			return traced
		}
	case '.':
		if has(text, "... ") {
			return traced
		}
	case '-':
		if has(text, "--- End of ") || has(text, "---> ") {
			return traced
		}
	case '}':
		if s == traced && len(text) == 1 {
			return traced
		}
	case 'N':
		if has(text, "Node.js v") {
			return last
		}
	case 'T':
		if s == raised && has(text, "Traceback (most recent call last)") {
			return l.only(python, pyTrace)
		}
	case '#', '[':
		if phpPart(text) {
			return traced
		}
	}
	if l.langs&ruby != 0 && rubyFrame(text) {
		return rubyTrace
	}
	return none
}

func stepGo(text []byte) state {
	switch text[0] {
	case 'g':
		if has(text, "goroutine ") {
			return goPanic
		}
	case 'c':
		if has(text, "created by ") {
			return goPanic
		}
	case '[':
		if has(text, "[signal ") || has(text, "[originating from") || has(text, "[recovered") {
			return goPanic
		}
	case 'e':
		if has(text, "exit status ") || has(text, "exit code ") {
			return last
		}
	case 'P':
		if has(text, "PC=") {
			return goPanic
		}
	}
	if has(text, "runtime stack:") || has(text, "runtime: ") || has(text, "fatal error: ") || register(text) || goCall(text) || goName(text) {
		return goPanic
	}
	return none
}

// register reads a line of the registers that a crash prints: "rax    0x0".
func register(text []byte) bool {
	i := bytes.IndexByte(text, ' ')
	return i >= 1 && i <= 6 && has(bytes.TrimLeft(text[i:], " "), "0x")
}

// goCall reads a function with its arguments: main.(*T).f(0xc000010000, ...).
func goCall(text []byte) bool {
	if text[len(text)-1] != ')' {
		return false
	}
	i := bytes.IndexByte(text, '(')
	name := text[:max(i, 0)]
	return bytes.IndexByte(name, '.') > 0 && bytes.IndexByte(name, ' ') < 0 || has(text, "panic(")
}

// goName reads a function without arguments, as zap writes its stacks.
func goName(text []byte) bool {
	if len(text) > maxWord || first[text[0]] != letter {
		return false
	}
	dot := false
	for _, c := range text {
		switch c {
		case '.':
			dot = true
		case '/', '(', ')', '*', '-', '[', ']':
		default:
			if !ident[c] {
				return false
			}
		}
	}
	return dot && text[len(text)-1] != '.'
}

func stepRace(text []byte) state {
	switch text[0] {
	case '=':
		if bar(text) {
			return last
		}
	case 'R', 'W', 'P', 'G', 'A', 'M', '[':
		for _, p := range [...]string{"Read at ", "Write at ", "Previous ", "Goroutine ", "Atomic ", "Mutex ", "WARNING: DATA RACE", "[failed to restore"} {
			if has(text, p) {
				return goRace
			}
		}
	}
	return none
}

// bar is the line around a report of the race detector.
func bar(text []byte) bool {
	return len(text) == len("==================") && len(bytes.TrimLeft(text, "=")) == 0
}

func goroutine(text []byte) bool {
	rest, ok := bytes.CutPrefix(text, []byte("goroutine "))
	if !ok {
		return false
	}
	i := bytes.IndexByte(rest, ' ')
	return i > 0 && digits(rest[:i]) && has(rest[i:], " [") || i > 0 && digits(rest[:i]) && has(rest[i:], " gp=")
}

// pyException reads the line that ends a traceback: a name, and a message or
// nothing.
func pyException(text []byte) bool {
	i := 0
	for n := min(len(text), maxWord); i < n && ident[text[i]]; i++ {
	}
	return i > 0 && (text[0] < '0' || text[0] > '9') && (i == len(text) || text[i] == ':')
}

// rubyFrame reads a place in a file of Ruby: app/a.rb:3:in `f'.
func rubyFrame(text []byte) bool {
	head := text[:min(len(text), placeWithin)]
	i := bytes.Index(head, []byte(".rb:"))
	if i < 0 || bytes.IndexByte(head[:i], ' ') >= 0 {
		return false
	}
	rest := bytes.TrimLeft(head[i+len(".rb:"):], "0123456789")
	return has(rest, ":in ") || has(rest, ": ") && bytes.HasSuffix(text, []byte("Error)"))
}

// uncaught reads what PHP says of an exception that nobody caught.
func uncaught(text []byte) state {
	text = bytes.TrimPrefix(text, []byte("PHP "))
	if has(text, "Fatal error: ") || has(text, "Stack trace:") || (has(text, "Warning: ") && bytes.Contains(text, []byte(" Uncaught "))) {
		return phpTrace
	}
	return none
}

// phpPart reads a line of a PHP trace: a title, a frame, the end of Laravel's.
func phpPart(text []byte) bool {
	switch text[0] {
	case '#':
		return len(text) > 1 && '0' <= text[1] && text[1] <= '9'
	case '[':
		return has(text, "[stacktrace]") || has(text, "[previous exception]")
	case '"':
		return has(text, `"}`)
	case 'S':
		return has(text, "Stack trace:")
	case 'N':
		return has(text, "Next ")
	case 'P':
		return has(text, "PHP Stack trace:") || has(text, "PHP   ")
	case 't':
		return has(text, "thrown in ")
	}
	return false
}

// klog reads the head of a line of klog: E1125 12:00:00.
func klog(text []byte) bool {
	return len(text) > 6 && digits(text[1:5]) && text[5] == ' '
}

func has(text []byte, prefix string) bool {
	return len(text) >= len(prefix) && string(text[:len(prefix)]) == prefix
}

// unindented is text without its spaces and tabs in front; bytes.TrimLeft takes
// longer.
func unindented(text []byte) []byte {
	for len(text) > 0 && (text[0] == ' ' || text[0] == '\t') {
		text = text[1:]
	}
	return text
}

func digits(b []byte) bool {
	for _, c := range b {
		if c < '0' || c > '9' {
			return false
		}
	}
	return len(b) > 0
}

func chomp(text []byte) []byte {
	if n := len(text); n > 0 && text[n-1] == '\r' {
		return text[:n-1]
	}
	return text
}
