package parse

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/elastic/go-grok/patterns"
)

// maxGrokDepth of patterns that name others; the deepest of the library has 7.
const maxGrokDepth = 32

var (
	reference = regexp.MustCompile(`%\{(\w+)(?::([\w.@+-]+)(?::(\w+))?)?\}`)

	kinds = map[string]kind{
		"": asText, "string": asText, "int": asInt, "long": asInt, "float": asFloat, "double": asFloat, "bool": asBool, "boolean": asBool,
	}

	// library is the patterns that a specification may name: those of Logstash in
	// RE2, and what other servers than httpd write.
	library = sync.OnceValue(func() map[string]string {
		own := map[string]string{
			// These take a twentieth of the library's steps, and match the same but for
			// the number and the length of their parts.
			"IPV6":     `(?:(?:[0-9A-Fa-f]+:){7}[0-9A-Fa-f]+|(?:[0-9A-Fa-f]+(?::[0-9A-Fa-f]+)*)?::(?:[0-9A-Fa-f]+:)*(?:[0-9]+\.[0-9]+\.[0-9]+\.[0-9]+|[0-9A-Fa-f]+)?)(?:%\w+)?`,
			"HOSTNAME": `\b[0-9A-Za-z][0-9A-Za-z-]*(?:\.[0-9A-Za-z][0-9A-Za-z-]*)*\.?`,
			"MONTH":    `\b(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*\b`,

			"NGINXACCESS": `%{IPORHOST:source.address} - (?:-|%{NOTSPACE:user.name}) \[%{HTTPDATE:timestamp}\] "(?:%{WORD:http.request.method} %{NOTSPACE:url.original}(?: HTTP/%{NUMBER:http.version})?|%{DATA})" %{INT:http.response.status_code:int} %{INT:http.response.body.bytes:long} "(?:-|%{DATA:http.request.referrer})" "(?:-|%{DATA:user_agent.original})"`,
			"NGINXERROR":  `%{YEAR}/%{MONTHNUM}/%{MONTHDAY} %{TIME} \[%{LOGLEVEL:log.level}\] %{POSINT:process.pid:int}#%{NONNEGINT:process.thread.id:int}: (?:\*%{NONNEGINT:nginx.error.connection_id:long} )?%{GREEDYDATA:message}`,
		}
		out := map[string]string{}
		for _, m := range [...]map[string]string{
			patterns.Default, patterns.AWS, patterns.HAProxy, patterns.Httpd, patterns.Java, patterns.MongoDB, patterns.PostgreSQL,
			patterns.Rails, patterns.Redis, patterns.Ruby, patterns.Squid, patterns.Syslog,
		} {
			maps.Copy(out, m)
		}
		maps.Copy(out, own)
		return out
	})
)

// expansion turns a grok pattern into a regular expression. The library that
// the patterns are from could do it too, but hides the expression, leaves a
// misspelt reference as it is, and makes two maps for each line.
type expansion struct {
	out    strings.Builder
	fields []group // index counts the groups that are named here
}

func compileGrok(spec string) (Parser, error) {
	var e expansion
	if err := e.expand(spec, nil); err != nil {
		return nil, fmt.Errorf("parser grok:%s: %w", spec, err)
	}
	if len(e.fields) == 0 {
		return nil, fmt.Errorf("parser grok:%s names no field; write %%{DATA:message} for what is wanted", spec)
	}
	p, err := newPattern(e.out.String())
	if err != nil {
		return nil, fmt.Errorf("parser grok:%s: %w; write what stands between the references as RE2 reads it", spec, err)
	}
	for i, name := range p.re.SubexpNames() {
		if n, err := strconv.Atoi(strings.TrimPrefix(name, "grok")); err == nil && n < len(e.fields) {
			g := e.fields[n]
			g.index = i
			p.groups = append(p.groups, g)
		} else if name != "" {
			p.groups = append(p.groups, group{index: i, name: strings.ReplaceAll(name, "__", ".")})
		}
	}
	return p, nil
}

// expand writes a pattern with all that it names; within says which ones led to
// it.
func (e *expansion) expand(text string, within []string) error {
	at := 0
	for _, m := range reference.FindAllStringSubmatchIndex(text, -1) {
		if err := e.literal(text[at:m[0]]); err != nil {
			return err
		}
		at = m[1]
		sub := func(i int) string {
			if m[2*i] < 0 {
				return ""
			}
			return text[m[2*i]:m[2*i+1]]
		}
		name := sub(1)
		body, ok := library()[name]
		if !ok {
			return fmt.Errorf("no pattern is called %q; %s", name, near(name))
		}
		if slices.Contains(within, name) || len(within) >= maxGrokDepth {
			return fmt.Errorf("pattern %q names itself", name)
		}
		open := "(?:"
		if field := sub(2); field != "" {
			k, ok := kinds[sub(3)]
			if !ok {
				return fmt.Errorf("type %q of field %q is unknown; write string, int, long, float, double, bool or boolean", sub(3), field)
			}
			open = fmt.Sprintf("(?P<grok%d>", len(e.fields))
			e.fields = append(e.fields, group{name: field, kind: k})
		}
		e.out.WriteString(open)
		if err := e.expand(body, append(within, name)); err != nil {
			return err
		}
		e.out.WriteByte(')')
	}
	return e.literal(text[at:])
}

func (e *expansion) literal(s string) error {
	if i := strings.Index(s, "%{"); i >= 0 {
		return fmt.Errorf("%.40q is no reference; write %%{PATTERN}, %%{PATTERN:field} or %%{PATTERN:field:type}", s[i:])
	}
	if e.out.WriteString(s); e.out.Len() > MaxExpanded {
		return fmt.Errorf("it has more than %d bytes with all that it names; name fewer patterns", MaxExpanded)
	}
	return nil
}

// near lists the patterns whose names share a beginning with one that is not
// known.
func near(name string) string {
	var out []string
	for known := range library() {
		if len(name) >= 3 && strings.HasPrefix(known, strings.ToUpper(name[:3])) {
			out = append(out, known)
		}
	}
	if len(out) == 0 {
		return "write IP, NUMBER, WORD, DATA, GREEDYDATA, TIMESTAMP_ISO8601, HTTPDATE, LOGLEVEL, UUID, COMBINEDAPACHELOG, NGINXACCESS, or another of Logstash's"
	}
	slices.Sort(out)
	return "there is " + strings.Join(out[:min(len(out), 8)], ", ")
}
