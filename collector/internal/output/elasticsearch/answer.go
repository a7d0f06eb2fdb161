package elasticsearch

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"github.com/outrigger-mesh/outrigger/collector/internal/output"
)

// filterPath is what is asked of the answer; the rest repeats what was sent. Every
// item has a status, so none is left out, and the items can be counted.
const filterPath = "errors,items.*.status,items.*.failure_store,items.*.error.type,items.*.error.reason,items.*.error.caused_by.reason"

// answer is a bulk response. Every item has one operation, here "create".
type answer struct {
	Items []map[string]item `json:"items"`
}

type item struct {
	Status       int       `json:"status"`
	FailureStore string    `json:"failure_store"`
	Error        itemError `json:"error"`
}

type itemError struct {
	Type     string `json:"type"`
	Reason   string `json:"reason"`
	CausedBy struct {
		Reason string `json:"reason"`
	} `json:"caused_by"`
}

func (e itemError) String() string {
	s := e.Type + ": " + e.Reason
	if e.CausedBy.Reason != "" {
		s += ": " + e.CausedBy.Reason
	}
	return shorten(s)
}

// allStored reports whether data is the answer to n records that were all stored,
// in the form in which Elasticsearch writes it under filterPath. It decodes
// nothing but trusts nothing either: it sees n times a status of success and no
// byte more. Any other answer, good or bad, is for verdicts to read.
func allStored(data []byte, n int) bool {
	rest, ok := bytes.CutPrefix(data, []byte(`{"errors":false,"items":[`))
	if !ok || n == 0 {
		return false
	}
	for i := range n {
		if i > 0 {
			if rest, ok = bytes.CutPrefix(rest, []byte(`,`)); !ok {
				return false
			}
		}
		const before, after = `{"create":{"status":20`, `}}`
		if rest, ok = bytes.CutPrefix(rest, []byte(before)); !ok || len(rest) < 1 || rest[0] != '0' && rest[0] != '1' {
			return false
		}
		if rest, ok = bytes.CutPrefix(rest[1:], []byte(after)); !ok {
			return false
		}
	}
	return string(bytes.TrimRight(rest, "\n")) == "]}"
}

// verdict is what an answer says of the records that were sent, whose indices in
// the batch are sent.
type verdict struct {
	output.Result
	// refused counts records for which this collector has no right or no index, and
	// why says so in the words of the first. They are in Retry.
	refused int
	why     string
	// failureStore counts records that no mapping took and that the cluster put into
	// the failure store of the data stream. They are stored: acknowledged.
	failureStore int
}

// read reads a bulk response. An answer that cannot be understood is an error:
// nothing in it counts as an acknowledgement.
func read(data []byte, sent []int) (verdict, error) {
	var v verdict
	if allStored(data, len(sent)) {
		return v, nil
	}
	var a answer
	if err := json.Unmarshal(data, &a); err != nil {
		return v, fmt.Errorf("the answer to a bulk request cannot be read (%d bytes): %w", len(data), err)
	}
	if len(a.Items) != len(sent) {
		return v, fmt.Errorf("the answer to a bulk request of %d items has %d", len(sent), len(a.Items))
	}
	for i, ops := range a.Items {
		it, ok := ops["create"]
		if !ok || len(ops) != 1 {
			return verdict{}, fmt.Errorf("item %d of the answer to a bulk request has no \"create\", or more than that", i)
		}
		switch status := it.Status; {
		case status >= 200 && status <= 299:
			if it.FailureStore == "used" {
				v.failureStore++
			}
		case status == http.StatusConflict:
			// An earlier attempt stored it.
		case status == http.StatusTooManyRequests || status >= 500 && status <= 599:
			v.Retry = append(v.Retry, sent[i])
		case status == http.StatusUnauthorized || status == http.StatusForbidden || status == http.StatusNotFound:
			// The installation's fault and not the record's: keep it.
			if v.refused++; v.refused == 1 {
				v.why = it.Error.String()
			}
			v.Retry = append(v.Retry, sent[i])
		case status >= 400 && status <= 499:
			v.Rejected = append(v.Rejected, output.Rejection{Index: sent[i], Reason: fmt.Sprintf("status %d: %s", status, it.Error)})
		default:
			return verdict{}, fmt.Errorf("item %d of the answer to a bulk request has status %d", i, status)
		}
	}
	if len(sent) > 0 && v.refused == len(sent) {
		v.Result = output.Result{Permanent: true, Err: errors.New("elasticsearch: every record was refused: " + v.why +
			": grant auto_configure and create_doc on logs-*-* (or on the index), or create the index")}
	}
	return v, nil
}
