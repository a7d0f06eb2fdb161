package deflate

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
)

// part is what a record consists of: bytes that the mark says have been there, or
// others.
type part struct {
	mark int // -1 for others
	b    []byte
}

// bulk is n documents as the Elasticsearch output makes them, of containers that
// take turns after each run of lines.
func bulk(n, containers, run int, message func(rng *rand.Rand, n int) string) (parts []part, plain []byte) {
	rng := rand.New(rand.NewPCG(11, 1))
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	offsets := make([]int, containers)
	marked := map[int][]byte{}
	add := func(mark int, format string, args ...any) {
		text := fmt.Appendf(nil, format, args...)
		plain = append(plain, text...)
		if last := len(parts) - 1; mark < 0 && last >= 0 && parts[last].mark < 0 {
			parts[last].b = append(parts[last].b, text...)
			return
		}
		if mark >= 0 { // one slice a mark
			if marked[mark] == nil {
				marked[mark] = text
			}
			text = marked[mark]
		}
		parts = append(parts, part{mark, text})
	}
	for i := range n {
		c := i / run % containers
		at = at.Add(time.Duration(1+rng.IntN(2_000_000)) * time.Nanosecond)
		pod := fmt.Sprintf("orders-7d9c8b5f6d-x2v%02d", c)
		uid := fmt.Sprintf("%08x-0000-4000-8000-%012x", c*7919, c)
		text := message(rng, i)
		add(0, `{"create":{"_index":"logs-outrigger-default"`)
		add(2+3*c, `,"_id":"Zm9vYmFyYmF6%04d`, c)
		add(-1, "%08x", offsets[c])
		add(-1, "\"}}\n"+`{"@timestamp":"%s","message":%q,"log.level":"info","stream":"stdout"`, at.Format("2006-01-02T15:04:05.000000000Z07:00"), text)
		add(3+3*c, `,"container.id":"%s","container.image.name":"registry.example/shop/orders:1.2.3","container.name":"app","host.name":"ip-10-0-17-3.eu-central-1.compute.internal","kubernetes.container.name":"app",`+
			`"kubernetes.deployment.name":"orders","kubernetes.labels.app_kubernetes_io_name":"orders","kubernetes.labels.app_kubernetes_io_part-of":"shop","kubernetes.labels.app_kubernetes_io_version":"1.2.3",`+
			`"kubernetes.labels.pod-template-hash":"7d9c8b5f6d","kubernetes.namespace":"shop","kubernetes.pod.ip":"10.1.2.%d","kubernetes.pod.name":%q,"kubernetes.pod.uid":%q,"orchestrator.cluster.name":"production","orchestrator.namespace":"shop","service.name":"orders"`,
			strings.Repeat(fmt.Sprintf("%08x", c*104729), 8), c, pod, uid)
		add(4+3*c, `,"log.file.path":"/var/log/pods/shop_%s_%s/app/0.log","log.offset":`, pod, uid)
		add(-1, "%d", offsets[c])
		add(1, `,"data_stream.type":"logs","data_stream.dataset":"outrigger","data_stream.namespace":"default"`)
		add(-1, "}\n")
		offsets[c] += 60 + len(text)
	}
	return parts, plain
}

func service(rng *rand.Rand, n int) string {
	return fmt.Sprintf("INFO  [worker-%d] com.example.shop.OrderService - order %d of customer %d accepted, reserved in warehouse fra-%d and handed to the carrier after %d ms",
		n%16, 10_000_000+rng.IntN(80_000_000), 100_000+rng.IntN(900_000), n%7, 10+rng.IntN(90))
}

func access(rng *rand.Rand, _ int) string {
	return fmt.Sprintf(`10.%d.%d.%d - - "GET /api/v1/orders/%d?user=%x HTTP/1.1" %d %d "-" "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/%d.0.0.0 Safari/537.36" trace=%016x%016x`,
		rng.IntN(4), rng.IntN(256), rng.IntN(256), rng.IntN(1e6), rng.IntN(1<<30), []int{200, 200, 200, 304, 404, 500}[rng.IntN(6)], rng.IntN(20000), 100+rng.IntN(20), rng.Uint64(), rng.Uint64())
}

var words = strings.Fields("the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which one you were all her she there would their we him been has when who will no more if out so up said what its about than into them can only other time new some could these two may first then do any like my now over such our man me even most made after also did many off before must well back through years much your way")

func prose(rng *rand.Rand, _ int) string {
	var b strings.Builder
	for b.Len() < 150 {
		b.WriteString(words[int(float64(len(words))*rng.Float64()*rng.Float64())])
		b.WriteByte(' ')
	}
	return b.String()
}

var corpora = []struct {
	name            string
	containers, run int
	message         func(*rand.Rand, int) string
}{
	{"service", 1, 1, service},
	{"access", 4, 250, access},
	{"prose", 4, 10, prose},
	{"turns", 50, 1, service},
}

// feed gives the parts to a writer.
func feed(w *Writer, out []byte, marks []Mark, parts []part) []byte {
	w.Reset(out)
	for _, p := range parts {
		if p.mark < 0 {
			w.Write(p.b)
		} else {
			w.Repeat(&marks[p.mark], p.b)
		}
	}
	return w.Close()
}

// BenchmarkBulk reports MB/s of documents and how large a stream is beside them.
func BenchmarkBulk(b *testing.B) {
	for _, c := range corpora {
		parts, plain := bulk(1000, c.containers, c.run, c.message)
		b.Run(c.name+"/marks", func(b *testing.B) {
			w, marks := NewWriter(), make([]Mark, 2+3*c.containers)
			out := feed(w, nil, marks, parts)
			b.SetBytes(int64(len(plain)))
			b.ReportAllocs()
			for b.Loop() {
				out = feed(w, out[:0], marks, parts)
			}
			b.ReportMetric(100*float64(len(out))/float64(len(plain)), "%")
		})
		b.Run(c.name+"/search", func(b *testing.B) {
			w := NewWriter()
			var out []byte
			b.SetBytes(int64(len(plain)))
			b.ReportAllocs()
			for b.Loop() {
				w.Reset(out[:0])
				w.Write(plain)
				out = w.Close()
			}
			b.ReportMetric(100*float64(len(out))/float64(len(plain)), "%")
		})
		b.Run(c.name+"/klauspost", func(b *testing.B) {
			z, err := gzip.NewWriterLevel(io.Discard, gzip.BestSpeed)
			if err != nil {
				b.Fatal(err)
			}
			var out bytes.Buffer
			b.SetBytes(int64(len(plain)))
			b.ReportAllocs()
			for b.Loop() {
				out.Reset()
				z.Reset(&out)
				_, _ = z.Write(plain) // into memory
				_ = z.Close()
			}
			b.ReportMetric(100*float64(out.Len())/float64(len(plain)), "%")
		})
	}
}

// klauspost is what others make of the bytes at their fastest level.
func klauspost(plain []byte) []byte {
	var out bytes.Buffer
	z, err := gzip.NewWriterLevel(&out, gzip.BestSpeed)
	if err != nil {
		panic(err)
	}
	_, _ = z.Write(plain) // into memory
	_ = z.Close()
	return out.Bytes()
}
