package frames

import (
	"bytes"
	"io"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

type seen struct {
	frames []Frame
	grown  []int64
	by     int64
}

func (s *seen) Frame(f Frame) error {
	f.Payload = bytes.Clone(f.Payload)
	s.frames = append(s.frames, f)
	return nil
}

func (s *seen) Shift(by int64) { s.by += by }

func (s *seen) Grow(stream uint32, by int64) { s.grown = append(s.grown, int64(stream), by) }

// TestReceivesWhatAFramerWrites: frames of another implementation, cut at every
// byte.
func TestReceivesWhatAFramerWrites(t *testing.T) {
	var wire bytes.Buffer
	w := http2.NewFramer(&wire, nil)
	for _, err := range []error{
		w.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1000}, http2.Setting{ID: http2.SettingHeaderTableSize, Val: 0}),
		w.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte("block"), EndHeaders: true, PadLength: 3, Priority: http2.PriorityParam{Weight: 5}}),
		w.WriteWindowUpdate(0, 10), w.WriteWindowUpdate(1, 20), w.WritePing(false, [8]byte{7}), w.WriteSettingsAck(),
		w.WriteDataPadded(1, true, []byte("data"), []byte{0, 0}), w.WriteRSTStream(3, http2.ErrCodeCancel),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for cut := range wire.Len() {
		var c Conn
		var s seen
		var out []byte
		c.Open(nil)
		used, err := c.Receive(wire.Bytes()[:cut], &out, &s)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Receive(wire.Bytes()[used:], &out, &s); err != nil {
			t.Fatal(err)
		}
		if !c.NoTable || c.Initial != 1000 || s.by != 1000-defaultWindow || c.Window != defaultWindow+10 {
			t.Errorf("cut at %d: windows %d, by %d, and %d", cut, c.Initial, s.by, c.Window)
		}
		want := []Frame{{Headers, false, 1, []byte("block")}, {Data, true, 1, []byte("data")}, {Reset, true, 3, []byte{0, 0, 0, 8}}}
		if d := cmp.Diff(want, s.frames); d != "" {
			t.Errorf("cut at %d: %s", cut, d)
		}
		if d := cmp.Diff([]int64{0, 10, 1, 20}, s.grown); d != "" {
			t.Errorf("cut at %d: %s", cut, d)
		}
		r := http2.NewFramer(io.Discard, bytes.NewReader(out))
		for _, kind := range []http2.FrameType{http2.FrameSettings, http2.FramePing} {
			if f, err := r.ReadFrame(); err != nil || f.Header().Type != kind || f.Header().Flags != ack {
				t.Errorf("cut at %d: answered %v, %v; want an acknowledged %v", cut, f, err, kind)
			}
		}
	}
}

// TestWhatEndsAConnectionIsSaid: none of these may pass for an answer.
func TestWhatEndsAConnectionIsSaid(t *testing.T) {
	f := func(kind, flags byte, payload string) {
		t.Helper()
		var c Conn
		var out []byte
		if _, err := c.Receive(Append(nil, kind, flags, 1, []byte(payload)), &out, &seen{}); err == nil {
			t.Errorf("frame of type %d with %q was taken", kind, payload)
		}
	}
	f(Headers, 0, "half")
	f(Data, padded, "\x09abc")
	f(Reset, 0, "\x00")
	f(goAway, 0, "\x00\x00\x00\x01\x00\x00\x00\x0bcalm")
	f(continuation, 0, "")
	f(windowUpdate, 0, "")
	if _, err := (&Conn{}).Receive([]byte{0xff, 0, 0, 0, 0, 0, 0, 0, 0}, nil, &seen{}); err == nil {
		t.Error("a frame of 16 MiB was awaited")
	}
}

// TestPreparedBlocksSayTheSameEachTime: a decoder that has read the first block
// reads any number of later ones, with literals between them.
func TestPreparedBlocksSayTheSameEachTime(t *testing.T) {
	list := []hpack.HeaderField{{Name: ":status", Value: "200"}, {Name: "content-type", Value: "application/grpc"}, {Name: "te", Value: "trailers"}}
	blocks := Prepare(slices.Clone(list)...)
	dec, without := hpack.NewDecoder(tableSize, nil), hpack.NewDecoder(0, nil)
	read := func(dec *hpack.Decoder, block []byte, want ...hpack.HeaderField) {
		t.Helper()
		got, err := dec.DecodeFull(block)
		if err != nil {
			t.Fatal(err)
		}
		for i := range got {
			got[i].Sensitive = false // says how it was sent
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Error(d)
		}
	}
	read(dec, blocks.First, list...)
	for range 3 {
		read(dec, blocks.Later, list...)
		read(dec, Literal("grpc-status", "0"), hpack.HeaderField{Name: "grpc-status", Value: "0"})
	}
	for range 2 {
		read(without, blocks.Plain, list...)
	}
	if len(blocks.Later) != len(list) {
		t.Errorf("a later block takes %d bytes for %d fields", len(blocks.Later), len(list))
	}
}

func FuzzReceive(f *testing.F) {
	f.Add(Append(nil, Data, padded, 1, []byte{1, 2}))
	f.Add(Append(nil, settings, 0, 0, make([]byte, 12)))
	f.Fuzz(func(t *testing.T, data []byte) {
		var c Conn
		var out []byte
		if used, err := c.Receive(data, &out, &seen{}); used > len(data) || err == nil && len(data)-used > headerLen+maxFrame {
			t.Errorf("%d of %d bytes used, %v", used, len(data), err)
		}
	})
}
