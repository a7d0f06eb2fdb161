package apptest

import (
	"encoding/xml"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// h2specExpected are the cases that fail and should, with the reason.
var h2specExpected = map[string]string{
	"http2/3.5: Sends invalid connection preface": "the port speaks HTTP/1.1 too: what is not HTTP/2's preface is a bad request of HTTP/1.1, " +
		"answered 400 and closed, as RFC 9113 section 3.4 allows; h2spec wants the end without the answer",
}

// TestH2Spec runs the h2spec suite (RFC 9113's predecessor RFC 7540, RFC 7541,
// and its own general cases) against both ports of a data path in HTTP/2.
// tools/h2spec.sh builds h2spec and says where it is.
func TestH2Spec(t *testing.T) {
	binary := os.Getenv("OUTRIGGER_H2SPEC")
	if binary == "" {
		t.Skip("make h2spec runs it: OUTRIGGER_H2SPEC names no h2spec")
	}
	old := newPair(t, "http", plainServer(t, 1), false)
	p := newPair(t, "http2", plainServer(t, 2), false)
	for name, address := range map[string]string{
		"ambassador port to HTTP 1": old.address, "ambassador port to HTTP 2": p.address,
		// An application is spoken to in what its caller speaks: HTTP/2, here.
		"inbound port": p.inbound,
	} {
		t.Run(name, func(t *testing.T) { h2spec(t, binary, address) })
	}
}

// plainServer answers everything 200 in clear, in HTTP/1.1 or in either version.
func plainServer(t *testing.T, version int) string {
	t.Helper()
	l, err := net.Listen("tcp", freeAddress(t))
	if err != nil {
		t.Fatal(err)
	}
	protocols := &http.Protocols{}
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(version == 2)
	s := &http.Server{ReadHeaderTimeout: 5 * time.Second, Protocols: protocols, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = io.WriteString(w, "hello")
	})}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	}()
	t.Cleanup(func() { _ = s.Close(); <-done })
	return l.Addr().String()
}

func h2spec(t *testing.T, binary, address string) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	report := filepath.Join(t.TempDir(), "report.xml")
	said, runErr := exec.CommandContext(t.Context(), binary, "--host", host, "--port", port, "--strict", "--timeout", "3", "--junit-report", report).CombinedOutput()
	b, err := os.ReadFile(report)
	if err != nil {
		t.Fatalf("h2spec wrote no report: %v, %v\n%s", err, runErr, said)
	}
	var suites struct {
		Suites []struct {
			Package string `xml:"package,attr"`
			Cases   []struct {
				Name    string    `xml:"classname,attr"`
				Failure *struct{} `xml:"failure"`
				Error   *struct{} `xml:"error"`
				Skipped *struct{} `xml:"skipped"`
			} `xml:"testcase"`
		} `xml:"testsuite"`
	}
	if err := xml.Unmarshal(b, &suites); err != nil {
		t.Fatal(err)
	}
	passed, skipped := 0, 0
	var failed, expected []string
	for _, s := range suites.Suites {
		for _, c := range s.Cases {
			name := s.Package + ": " + c.Name
			switch {
			case c.Skipped != nil:
				skipped++
			case c.Failure == nil && c.Error == nil:
				passed++
			case h2specExpected[name] != "":
				expected = append(expected, name)
			default:
				failed = append(failed, name)
			}
		}
	}
	slices.Sort(failed)
	t.Logf("h2spec: %d passed, %d failed, %d skipped, %d failed as expected", passed, len(failed), skipped, len(expected))
	if len(failed) > 0 {
		t.Errorf("failed: %q\n%s", failed, said)
	}
	if passed < 140 {
		t.Errorf("only %d cases were played", passed)
	}
}
