package rebuild

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"hash"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
)

// sum is a SHA-256.
type sum [sha256.Size]byte

// versions are the hashes of what a Mesh is made of. They make a version that is
// brought up to date at the cost of what has changed.
type versions struct {
	trustDomain string
	services    map[mesh.Name]sum
	instances   map[mesh.Name]sum
	all         sum // of all of them, exclusive or: no two are of the same name
}

func newVersions(m *mesh.Mesh) versions {
	v := versions{
		trustDomain: m.TrustDomain, services: make(map[mesh.Name]sum, len(m.Services)), instances: make(map[mesh.Name]sum, len(m.Instances)),
	}
	h := sha256.New()
	for i := range m.Services {
		s := &m.Services[i]
		v.set(v.services, mesh.Name{Namespace: s.Namespace, Name: s.Name}, sumOf(h, "service", s))
	}
	for i := range m.Instances {
		in := &m.Instances[i]
		v.set(v.instances, mesh.Name{Namespace: in.Namespace, Name: in.Name}, sumOf(h, "instance", in))
	}
	return v
}

// update returns the version of a Mesh that differs by c from the last.
func (v *versions) update(m *mesh.Mesh, c mesh.Change) string {
	h := sha256.New()
	for _, n := range c.Services {
		v.set(v.services, n, sumOf(h, "service", m.Service(n)))
	}
	for _, n := range c.Instances {
		if in := m.Instance(n); in != nil {
			v.set(v.instances, n, sumOf(h, "instance", in))
			continue
		}
		v.flip(v.instances[n])
		delete(v.instances, n)
	}
	return v.String()
}

func (v *versions) set(of map[mesh.Name]sum, n mesh.Name, now sum) {
	if old, had := of[n]; had {
		v.flip(old)
	}
	v.flip(now)
	of[n] = now
}

func (v *versions) flip(s sum) {
	for i := range s {
		v.all[i] ^= s[i]
	}
}

// String is the version.
func (v *versions) String() string {
	s := sha256.Sum256(append([]byte(v.trustDomain+"\x00"), v.all[:]...))
	return hex.EncodeToString(s[:8])
}

// sumOf hashes a part of a mesh, of a kind. A part holds nothing that JSON cannot
// say, so that encoding it cannot fail.
func sumOf(h hash.Hash, kind string, part any) (out sum) {
	h.Reset()
	_, _ = h.Write([]byte(kind)) // a hash never fails to write
	if err := json.NewEncoder(h).Encode(part); err != nil {
		panic("rebuild: cannot encode the mesh: " + err.Error())
	}
	h.Sum(out[:0])
	return out
}

// versionOf is the version of a Mesh.
func versionOf(m *mesh.Mesh) string {
	v := newVersions(m)
	return v.String()
}
