package metadata

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/outrigger-mesh/outrigger/atomicfile"
)

// The cache file is a line of header and one JSON document:
//
//	outrigger-metadata 1 <CRC-32C of the document, 8 hex digits> <its length>
const (
	header = "outrigger-metadata 1 %08x %d\n"
	// maxCache bytes are read and written at most; pods beyond it are left out.
	maxCache = 32 << 20
	// saveEvery is how old the file may be.
	saveEvery = 10 * time.Second
)

var errDamaged = errors.New("the cache of metadata is damaged")

type document struct {
	Pods       []*pod                       `json:"pods"` // the longest unused first
	Namespaces map[string]map[string]string `json:"namespaces"`
}

func encode(d document) ([]byte, error) {
	body, err := json.Marshal(d)
	if err != nil {
		return nil, fmt.Errorf("encode the cache of metadata: %w", err)
	}
	return append(fmt.Appendf(nil, header, crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)), len(body)), body...), nil
}

func decode(b []byte) (document, error) {
	var d document
	head, body, ok := bytes.Cut(b, []byte{'\n'})
	want := fmt.Sprintf(header, crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)), len(body))
	if !ok || string(head)+"\n" != want {
		return d, fmt.Errorf("%w: its header is %.60q; for what follows it should be %q", errDamaged, head, want)
	}
	if err := json.Unmarshal(body, &d); err != nil {
		return d, fmt.Errorf("%w: %w", errDamaged, err)
	}
	return d, nil
}

// load takes in the cache file. One that is damaged is set aside: without it
// records are only barer for some seconds.
func (s *Store) load() {
	if s.cfg.CacheFile == "" {
		return
	}
	f, err := os.Open(s.cfg.CacheFile)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var b []byte
	if err == nil {
		b, err = io.ReadAll(io.LimitReader(f, maxCache+1))
		err = errors.Join(err, f.Close())
	}
	var d document
	if err == nil {
		d, err = decode(b)
	}
	if err != nil {
		s.metrics.failures.WithLabelValues("cache").Inc()
		aside := s.cfg.CacheFile + ".damaged"
		s.cfg.Log.Warn("the cache of metadata cannot be read; it is set aside, and all is asked for again", "error.message", err.Error(), "file.path", aside)
		if err := os.Rename(s.cfg.CacheFile, aside); err != nil {
			s.cfg.Log.Warn("the damaged cache cannot be renamed", "error.message", err.Error())
		}
		return
	}
	for _, p := range d.Pods {
		if p != nil {
			if p.Containers == nil {
				p.Containers = map[string]container{}
			}
			s.put(p, 0)
		}
	}
	for name, labels := range d.Namespaces {
		if labels != nil && len(s.namespaces) < DefaultMaxNamespaces {
			s.namespaces[name] = labels
		}
	}
	s.dirty = false
}

// save writes the cache file if something has changed.
func (s *Store) save() {
	s.mu.Lock()
	if s.cfg.CacheFile == "" || !s.dirty {
		s.mu.Unlock()
		return
	}
	s.dirty = false
	d := document{Namespaces: map[string]map[string]string{}}
	for at := s.lru.Front(); at != nil; at = at.Next() {
		if e, ok := at.Value.(*entry); ok {
			d.Pods = append(d.Pods, e.pod)
			if labels, ok := s.namespaces[e.pod.Namespace]; ok {
				d.Namespaces[e.pod.Namespace] = labels
			}
		}
	}
	s.mu.Unlock() // what a pod holds is never changed, only replaced
	b, err := encode(d)
	for err == nil && len(b) > maxCache {
		d.Pods = d.Pods[(len(d.Pods)+1)/2:]
		b, err = encode(d)
	}
	if err == nil {
		err = atomicfile.Write(s.cfg.CacheFile, b, 0o600)
	}
	if err != nil {
		s.metrics.failures.WithLabelValues("cache").Inc()
		s.cfg.Log.Warn("the cache of metadata cannot be written; trying again", "error.message", err.Error())
		s.mu.Lock()
		s.dirty = true
		s.mu.Unlock()
	}
}
