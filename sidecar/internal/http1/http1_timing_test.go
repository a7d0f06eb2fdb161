package http1_test

import (
	"testing"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
)

func BenchmarkParseRequest(b *testing.B) {
	var h http1.Head
	in := []byte(typical)
	b.SetBytes(int64(len(in)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := http1.ParseRequest(&h, in, nil); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkParseResponse(b *testing.B) {
	var h http1.Head
	in, method := []byte(typicalResponse), []byte("POST")
	b.SetBytes(int64(len(in)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := http1.ParseResponse(&h, in, nil, method); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAppendRequestHead(b *testing.B) {
	var h http1.Head
	if _, err := http1.ParseRequest(&h, []byte(typical), nil); err != nil {
		b.Fatal(err)
	}
	edit, dst := typicalEdit(), make([]byte, 0, 4096)
	b.ReportAllocs()
	for b.Loop() {
		dst = http1.AppendRequestHead(dst[:0], &h, edit)
	}
}

func BenchmarkNormalizePath(b *testing.B) {
	target, dst := []byte("/api/v1/payments?currency=EUR"), make([]byte, 0, 256)
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := http1.NormalizePath(dst, target); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkBodyChunked(b *testing.B) {
	var d http1.Body
	in := http1.AppendChunkHeader(nil, 1024)
	in = append(in, make([]byte, 1024)...)
	in = append(in, http1.ChunkEnd...)
	in = http1.AppendLastChunk(in, nil)
	b.SetBytes(1024)
	b.ReportAllocs()
	for b.Loop() {
		d.Reset(http1.Chunked, 0)
		for rest := in; !d.Done(); {
			n, _, _, err := d.Next(rest)
			if err != nil {
				b.Fatal(err)
			}
			rest = rest[n:]
		}
	}
}
