// Package manifests reads the objects of a mesh from a folder of Kubernetes
// YAML and JSON: on a laptop, in tests, in a dry run, or from a mounted
// ConfigMap.
//
// It knows files, YAML and which kinds exist; it does not know what the
// objects mean, which is translate's business. rebuild calls Load whenever
// Watch says that something changed.
//
// A file is taken or left as a whole. As long as something in it cannot be
// read, its last good version stays in force, and a Problem says so with the
// line; a file that has never been good gives the objects in it that can be
// read.
package manifests

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/translate"
)

// The limits of a folder. What exceeds them is left out and reported.
const (
	MaxFiles = 10_000
	// MaxFileSize in bytes.
	MaxFileSize = 4 << 20
	// maxDepth of subfolders. It also ends a walk through symbolic links that
	// lead back.
	maxDepth = 32
)

// Source is a folder of manifests. Its methods are safe for concurrent use.
type Source struct {
	dir string
	log *slog.Logger

	mu sync.Mutex
	// files by name relative to dir, as the last Load left them.
	files map[string]*file
	// seen is what the folder looked like when the last Load began.
	seen listing
}

// file is what is known of one file.
type file struct {
	sum [sha256.Size]byte
	// content is what the bytes with this sum say.
	content parsed
	// good is the last version without an error, or nil.
	good *parsed
}

// New returns the folder dir as a Source. Nothing is read before Load.
func New(dir string, log *slog.Logger) *Source {
	return &Source{dir: dir, log: log, files: map[string]*file{}}
}

// Check returns an error that names the folder if it is missing, not a folder
// or not readable. Programs call it when they start; a folder that goes away
// later is a Problem of Load.
func (s *Source) Check() error {
	if _, err := os.ReadDir(s.dir); err != nil {
		return fmt.Errorf("folder of manifests: %w", err)
	}
	return nil
}

// Load reads the folder. Objects that did not change since the last Load may
// be the same pointers as then, so nobody may change them; their annotation
// translate.SourceAnnotation says file and line. The order is by file name and
// place in the file. An object without namespace is in "default".
//
// Of two objects with the same kind, namespace and name the first is used.
func (s *Source) Load() (translate.Objects, []translate.Problem) {
	s.mu.Lock()
	defer s.mu.Unlock()

	list, problems := list(s.dir)
	s.seen = list
	names := list.names()

	var gone []string
	for name := range s.files {
		if _, ok := list.files[name]; !ok && !list.unread(name) {
			gone = append(gone, name)
		}
	}
	for _, name := range gone {
		delete(s.files, name)
	}

	for _, name := range names {
		problems = append(problems, s.read(name)...)
	}
	// In place of a folder that cannot be listed its files of last time stand.
	for name := range s.files {
		if _, ok := list.files[name]; !ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)

	var out translate.Objects
	owner := map[identity]string{}
	for _, name := range names {
		f := s.files[name]
		if f == nil {
			continue
		}
		inForce := &f.content
		if f.content.broken && f.good != nil {
			inForce = f.good
		}
		for _, o := range inForce.objects {
			if first, taken := owner[o.id]; taken {
				problems = append(problems, translate.Problem{
					Kind: o.id.kind, Namespace: o.id.namespace, Name: o.id.name, Source: o.source,
					Field: "metadata.name", Reason: translate.ReasonConflicted,
					Message: fmt.Sprintf("defined in %s already, which is used; rename or delete one", first),
				})
				continue
			}
			owner[o.id] = o.source
			o.addTo(&out)
		}
	}
	return out, problems
}

// read brings one file up to date.
func (s *Source) read(name string) []translate.Problem {
	f := s.files[name]
	keep := func(message string) []translate.Problem {
		if f != nil {
			message += "; the last good version stays in force"
		}
		return []translate.Problem{fileProblem(name, 0, message)}
	}

	data, err := readFile(filepath.Join(s.dir, filepath.FromSlash(name)))
	if err != nil {
		// Half a rename: it is a deletion if the next sweep does not find it.
		return keep("cannot be read: " + reasonOf(err))
	}
	if len(data) == 0 && f != nil && (f.good != nil && len(f.good.objects) > 0 || len(f.content.objects) > 0) {
		// Editors that truncate before they write show an empty file.
		return keep("is empty; delete the file to remove its objects")
	}
	if sum := sha256.Sum256(data); f == nil || f.sum != sum {
		content := parse(name, data)
		if f == nil {
			f = &file{}
			s.files[name] = f
		}
		f.sum, f.content = sum, content
		if !content.broken {
			f.good = &content
		}
	}
	problems := slices.Clone(f.content.problems)
	if f.content.broken && f.good != nil {
		for i := range problems {
			if f.content.blocking[i] {
				problems[i].Message += "; the last good version stays in force"
			}
		}
	}
	return problems
}

func readFile(path string) (data []byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	data, err = io.ReadAll(io.LimitReader(f, MaxFileSize+1))
	if err == nil && len(data) > MaxFileSize {
		err = fmt.Errorf("larger than %d bytes; split it", MaxFileSize)
	}
	return data, err
}

// reasonOf leaves out the path, which a Problem names already.
func reasonOf(err error) string {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err.Error()
	}
	return err.Error()
}

func fileProblem(name string, line int, message string) translate.Problem {
	return translate.Problem{Kind: translate.KindFile, Name: name, Source: source(name, line), Reason: translate.ReasonInvalid, Message: message}
}

func source(name string, line int) string {
	if line < 1 {
		return name
	}
	return fmt.Sprintf("%s:%d", name, line)
}

// listing is what a folder holds.
type listing struct {
	// files by name relative to the folder, with slashes.
	files map[string]fs.FileInfo
	// folders to watch, with their paths.
	folders []string
	// failed are the folders that could not be listed, by name; "." is the
	// whole.
	failed []string
}

func (l listing) names() []string {
	out := make([]string, 0, len(l.files))
	for name := range l.files {
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}

// unread says that a file may still be there: its folder could not be listed.
func (l listing) unread(name string) bool {
	for _, d := range l.failed {
		if d == "." || strings.HasPrefix(name, d+"/") {
			return true
		}
	}
	return false
}

// same says whether two listings show the same files in the same state.
func (l listing) same(o listing) bool {
	if len(l.files) != len(o.files) || !slices.Equal(l.failed, o.failed) {
		return false
	}
	for name, a := range l.files {
		b, ok := o.files[name]
		if !ok || a.Size() != b.Size() || !a.ModTime().Equal(b.ModTime()) || a.Mode() != b.Mode() || !os.SameFile(a, b) {
			return false
		}
	}
	return true
}

// list walks the folder. Symbolic links are followed: a mounted ConfigMap
// shows each file as a link through the hidden link ..data.
func list(dir string) (listing, []translate.Problem) {
	l := listing{files: map[string]fs.FileInfo{}}
	var problems []translate.Problem
	var walk func(name string, above []fs.FileInfo)
	full := false
	walk = func(name string, above []fs.FileInfo) {
		path := filepath.Join(dir, filepath.FromSlash(name))
		fail := func(err error) {
			l.failed = append(l.failed, name)
			at := name
			if name == "." {
				at = dir
			}
			problems = append(problems, fileProblem(at, 0,
				"cannot be listed: "+reasonOf(err)+"; what was read from it before stays in force"))
		}
		self, err := os.Stat(path)
		if err != nil {
			fail(err)
			return
		}
		for _, a := range above {
			if os.SameFile(a, self) {
				return // a link back to a folder that is being walked
			}
		}
		if len(above) >= maxDepth {
			problems = append(problems, fileProblem(name, 0,
				fmt.Sprintf("is ignored: more than %d folders deep; move it up", maxDepth)))
			return
		}
		entries, err := os.ReadDir(path)
		if err != nil {
			fail(err)
			return
		}
		l.folders = append(l.folders, path)
		for _, e := range entries {
			if hidden(e.Name()) {
				continue
			}
			child := e.Name()
			if name != "." {
				child = name + "/" + child
			}
			info, err := os.Stat(filepath.Join(path, e.Name()))
			switch {
			case errors.Is(err, fs.ErrNotExist) && e.Type()&fs.ModeSymlink == 0:
				// Deleted while the folder was being listed.
			case err != nil:
				if wanted(e.Name()) {
					problems = append(problems, fileProblem(child, 0, "cannot be read: "+reasonOf(err)))
				}
			case info.IsDir():
				walk(child, append(slices.Clip(above), self))
			case !wanted(e.Name()) || !info.Mode().IsRegular():
			case len(l.files) >= MaxFiles:
				full = true
			default:
				l.files[child] = info
			}
		}
	}
	walk(".", nil)
	if full {
		problems = append(problems, fileProblem(dir, 0,
			fmt.Sprintf("holds more than %d files; the rest, by name, is ignored", MaxFiles)))
	}
	slices.Sort(l.failed)
	return l, problems
}

// hidden says whether a file or folder is none of ours: hidden files, and what
// editors leave behind.
func hidden(name string) bool {
	return strings.HasPrefix(name, ".") || strings.HasPrefix(name, "#") || strings.HasPrefix(name, "~") || strings.HasSuffix(name, "~")
}

// wanted says whether the name is one of a manifest.
func wanted(name string) bool {
	switch strings.ToLower(filepath.Ext(name)) {
	case ".yaml", ".yml", ".json":
		return !hidden(name)
	default:
		return false
	}
}
