package xdsclient

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/outrigger-mesh/outrigger/atomicfile"
)

// The file of the last good configuration is one line,
//
//	outrigger last good configuration 1 <SHA-256 of the rest, in hexadecimal>
//
// and a DeltaDiscoveryResponse: the resources that were accepted with their
// versions, and as removed_resources "<type URL> <name>" those that do not
// exist.
const lastGoodHeader = "outrigger last good configuration 1 "

// maxLastGood bounds the file, in bytes.
const maxLastGood = 64 << 20

// errDamaged: the file is not what was written.
var errDamaged = errors.New("it is damaged")

func encodeLastGood(list []saved) ([]byte, error) {
	var m discoveryv3.DeltaDiscoveryResponse
	for _, r := range list {
		if r.missing {
			m.RemovedResources = append(m.RemovedResources, r.kind.typeURL()+" "+r.name)
			continue
		}
		m.Resources = append(m.Resources, &discoveryv3.Resource{
			Name: r.name, Version: r.version, Resource: &anypb.Any{TypeUrl: r.kind.typeURL(), Value: r.raw},
		})
	}
	body, err := proto.MarshalOptions{Deterministic: true}.Marshal(&m)
	if err != nil {
		return nil, err
	}
	if len(body) > maxLastGood {
		return nil, fmt.Errorf("the configuration has %d bytes, %d are allowed", len(body), maxLastGood)
	}
	sum := sha256.Sum256(body)
	return append([]byte(lastGoodHeader+hex.EncodeToString(sum[:])+"\n"), body...), nil
}

// decodeLastGood fails with errDamaged.
func decodeLastGood(b []byte) ([]saved, error) {
	line, body, ok := bytes.Cut(b, []byte("\n"))
	sum := sha256.Sum256(body)
	if !ok || string(line) != lastGoodHeader+hex.EncodeToString(sum[:]) {
		return nil, fmt.Errorf("%w: the first line does not fit the rest", errDamaged)
	}
	var m discoveryv3.DeltaDiscoveryResponse
	if err := proto.Unmarshal(body, &m); err != nil {
		return nil, fmt.Errorf("%w: %w", errDamaged, err)
	}
	var out []saved
	for _, r := range m.GetResources() {
		k, ok := kindOf(r.GetResource().GetTypeUrl())
		if !ok {
			return nil, fmt.Errorf("%w: resource %q has the type %q", errDamaged, r.GetName(), r.GetResource().GetTypeUrl())
		}
		out = append(out, saved{kind: k, name: r.GetName(), version: r.GetVersion(), raw: r.GetResource().GetValue()})
	}
	for _, r := range m.GetRemovedResources() {
		url, name, _ := strings.Cut(r, " ")
		k, ok := kindOf(url)
		if !ok {
			return nil, fmt.Errorf("%w: removed resource %q", errDamaged, r)
		}
		out = append(out, saved{kind: k, name: name, missing: true})
	}
	return out, nil
}

// readLastGood returns nothing where there is no file yet.
func readLastGood(path string) (list []saved, err error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	b, err := io.ReadAll(io.LimitReader(f, maxLastGood+1024))
	if err != nil {
		return nil, err
	}
	return decodeLastGood(b)
}

// writeLastGood replaces the file as a whole: after a crash there is the old one
// or the new one.
func writeLastGood(path string, list []saved) error {
	b, err := encodeLastGood(list)
	if err != nil {
		return err
	}
	return atomicfile.Write(path, b, 0o600)
}
