package torture

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/vmihailenco/msgpack/v5"
	"google.golang.org/protobuf/encoding/protowire"
)

func post(t *testing.T, url string, body []byte) (int, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, _ = z.Write(body)
	_ = z.Close()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, &b)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Encoding", "gzip")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer func() { _ = resp.Body.Close() }() // it was read
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}

func TestElasticsearchIsAsStrictAsTheRealOne(t *testing.T) {
	j := newJudge()
	e, err := newElasticsearch(j, "", "torture")
	if err != nil {
		t.Fatal(err)
	}
	defer e.close()
	_, texts := wrote(1, 3, 30, plain)
	doc := func(n int) string {
		b, err := json.Marshal(map[string]any{"@timestamp": "2026-01-01T00:00:00Z", "message": string(texts[n])})
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	body := `{"create":{"_index":"logs-a-b","_id":"1"}}` + "\n" + doc(0) + "\n" +
		`{"create":{"_index":"logs-a-b","_id":"1"}}` + "\n" + doc(0) + "\n" +
		`{"create":{"_index":"logs-a-c","_id":"1"}}` + "\n" + doc(1) + "\n" +
		`{"index":{"_index":"logs-a-b"}}` + "\n" + doc(2) + "\n" +
		`{"create":{"_index":"logs-a-b"}}` + "\n" + `{"message":"no time"}` + "\n"
	status, answer := post(t, e.address()+"/_bulk", []byte(body))
	var got []string
	for part := range strings.SplitSeq(answer, `"status":`) {
		got = append(got, part[:min(3, len(part))])
	}
	if status != 200 || strings.Join(got[1:], " ") != "201 409 201 400 400" || !strings.Contains(answer, `"errors":true`) {
		t.Errorf("%d %s", status, answer)
	}
	if n := j.count(); n != 2 || j.duplicated != 0 {
		t.Errorf("%d arrived, %d twice", n, j.duplicated)
	}
	for _, c := range []struct {
		fault fault
		want  int
	}{{fault{mode: busy}, 503}, {fault{mode: busy}, 429}, {fault{mode: tooLarge, limit: 10}, 413}, {fault{mode: swallow}, 0}, {fault{}, 200}} {
		e.set(c.fault)
		if status, answer := post(t, e.address()+"/_bulk", []byte(`{"create":{"_index":"x","_id":"2"}}`+"\n"+doc(2)+"\n")); status != c.want && !(c.fault.mode == busy && (status == 429 || status == 503)) {
			t.Errorf("%+v: %d %s", c.fault, status, answer)
		}
	}
	if n := j.count(); n != 3 || j.duplicated != 0 { // swallowed, and then a 409
		t.Errorf("%d arrived, %d twice", n, j.duplicated)
	}
	e.down()
	if status, _ := post(t, e.address()+"/_bulk", nil); status != 0 {
		t.Errorf("down, and it answers %d", status)
	}
	if err := e.up(); err != nil {
		t.Fatal(err)
	}
	if status, _ := post(t, e.address()+"/_bulk", nil); status != 200 {
		t.Errorf("up again, and it answers %d", status)
	}
}

func TestOTLPBodiesAreFound(t *testing.T) {
	j := newJudge()
	o, err := newOTLP(j)
	if err != nil {
		t.Fatal(err)
	}
	defer o.close()
	wrap := func(n protowire.Number, b []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(nil, n, protowire.BytesType), b)
	}
	_, texts := wrote(1, 2, 30, plain)
	var scope []byte
	for _, text := range texts {
		record := protowire.AppendFixed64(protowire.AppendTag(nil, 1, protowire.Fixed64Type), 7)
		scope = append(scope, wrap(2, append(record, wrap(5, wrap(1, text))...))...)
	}
	if status, answer := post(t, o.address()+"/v1/logs", wrap(1, wrap(2, scope))); status != 200 {
		t.Errorf("%d %s", status, answer)
	}
	if n := j.count(); n != 2 || j.alien != 0 {
		t.Errorf("%d arrived, %d of others", n, j.alien)
	}
	if status, _ := post(t, o.address()+"/v1/logs", []byte("\xff\xff")); status != 400 {
		t.Errorf("garbage is answered with %d", status)
	}
}

// modes are the same two records in the four modes of the protocol.
func modes(t *testing.T, texts [][]byte) map[string][]any {
	t.Helper()
	record := func(i int) map[string]any {
		return map[string]any{"other": []any{1, "x"}, "message": string(texts[i])}
	}
	at := int64(1_700_000_000)
	var packed, compressed bytes.Buffer
	for i := range 2 {
		b, err := msgpack.Marshal([]any{at, record(i)})
		if err != nil {
			t.Fatal(err)
		}
		packed.Write(b)
	}
	z := gzip.NewWriter(&compressed)
	_, _ = z.Write(packed.Bytes())
	_ = z.Close()
	option := func(chunk string) map[string]any { return map[string]any{"size": 2, "chunk": chunk} }
	zipped := option("z")
	zipped["compressed"] = "gzip"
	return map[string][]any{
		"Message":                 {"tag", at, record(0), option("m")},
		"Forward":                 {"tag", []any{[]any{at, record(0)}, []any{at, record(1)}}, option("f")},
		"PackedForward":           {"tag", packed.Bytes(), option("p")},
		"CompressedPackedForward": {"tag", compressed.Bytes(), zipped},
	}
}

func TestForwardTakesAllModes(t *testing.T) {
	_, texts := wrote(1, 2, 30, plain)
	for name, m := range modes(t, texts) {
		for _, key := range []string{"", "secret"} {
			t.Run(fmt.Sprintf("%s key %q", name, key), func(t *testing.T) {
				j := newJudge()
				f, err := newForward(j, key)
				if err != nil {
					t.Fatal(err)
				}
				defer f.close()
				c, d := dial(t, f.address())
				if key != "" && !greet(t, c, d, key) {
					t.Fatal("refused")
				}
				b, err := msgpack.Marshal(m)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := c.Write(b); err != nil {
					t.Fatal(err)
				}
				answer := map[string]string{}
				if err := d.Decode(&answer); err != nil {
					t.Fatal(err)
				}
				want := 2
				if name == "Message" {
					want = 1
				}
				if n := j.count(); n != want || answer["ack"] != strings.ToLower(name[:1]) && answer["ack"] != "z" {
					t.Errorf("%d arrived, answer %v", n, answer)
				}
			})
		}
	}
}

func TestForwardRefusesAnotherKey(t *testing.T) {
	f, err := newForward(newJudge(), "secret")
	if err != nil {
		t.Fatal(err)
	}
	defer f.close()
	c, d := dial(t, f.address())
	if greet(t, c, d, "guess") {
		t.Error("let in")
	}
}

func dial(t *testing.T, address string) (net.Conn, *msgpack.Decoder) {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return c, msgpack.NewDecoder(c)
}

// greet is the client's side of the handshake.
func greet(t *testing.T, c net.Conn, d *msgpack.Decoder, key string) bool {
	t.Helper()
	var helo []any
	if err := d.Decode(&helo); err != nil {
		t.Fatal(err)
	}
	options, ok := helo[1].(map[string]any)
	if !ok {
		t.Fatalf("%v", helo)
	}
	sum := sha512.Sum512([]byte("salt" + "me" + fmt.Sprint(options["nonce"]) + key))
	b, err := msgpack.Marshal([]any{"PING", "me", "salt", hex.EncodeToString(sum[:]), "", ""})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(b); err != nil {
		t.Fatal(err)
	}
	var pong []any
	if err := d.Decode(&pong); err != nil {
		t.Fatal(err)
	}
	return pong[1] == true
}

func FuzzForward(f *testing.F) {
	f.Add([]byte{0x93, 0xa1, 't', 0x01, 0x81, 0xa3, 'l', 'o', 'g', 0xa1, 'x'})
	f.Add([]byte{0x92, 0xa1, 't', 0xc4, 0x01, 0x92})
	f.Fuzz(func(_ *testing.T, b []byte) {
		d := msgpack.NewDecoder(bytes.NewReader(b))
		for {
			if _, _, err := message(d); err != nil {
				return
			}
		}
	})
}
