package tail

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// sweepFiles brings the generations of single files up to date. A rotated file
// is followed as long as its inode is known; what was rotated away before we first saw it
// is not ours. seen gets the folders.
func (f *Follower) sweepFiles(in *Files, visit func(string), seen map[string]bool) (complete bool) {
	complete = true
	lives := map[string]bool{}
	for _, pattern := range in.Patterns {
		paths, err := filepath.Glob(pattern)
		if err != nil { // the configuration was checked
			f.failed("list", pattern, err)
			return false
		}
		if visit != nil {
			visit(filepath.Dir(pattern)) // so that a new file there is told of
		}
		for _, path := range paths {
			if f.isFile(path) {
				lives[path] = true
			}
		}
	}
	folders := map[string][]string{}
	for _, l := range f.logs {
		if l.input == in {
			lives[l.path] = true
		}
	}
	for path := range lives {
		folder := filepath.Dir(path)
		folders[folder] = append(folders[folder], path)
	}
	for folder, paths := range folders {
		seen[folder] = true
		if visit != nil {
			visit(folder)
		}
		entries, err := os.ReadDir(folder)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			f.failed("list", folder, err)
			complete = false
			continue
		}
		for _, live := range paths {
			l := f.logs[live]
			if l == nil {
				r := in.Resource
				r.Node, r.Cluster = f.cfg.Node, f.cfg.Cluster
				l = &containerLog{path: live, input: in, from: &r, since: stampOf(f.cfg.Now())}
				f.add(l)
			}
			n := &listing{live: live}
			for _, e := range entries {
				path := filepath.Join(folder, e.Name())
				switch {
				case path == live:
					n.add(path)
					n.linked = e.Type()&fs.ModeSymlink != 0
				case lives[path] || !rotated(e.Name(), filepath.Base(live)) || !e.Type().IsRegular():
				case in.Own && !strings.HasSuffix(path, ".tmp"), f.ours(l, path):
					n.add(path)
				default:
					if info, err := e.Info(); err == nil {
						n.holes = append(n.holes, l.age(&generation{path: path, modified: stampOf(info.ModTime())}))
					}
				}
			}
			if !f.bring(l, n) {
				complete = false
			}
			f.place(l, n)
			f.missing(l, n)
		}
	}
	return complete
}

// isContainer reports whether a folder lies where kubelet has those of containers.
func (f *Follower) isContainer(folder string) bool {
	if f.cfg.Folder == "" {
		return false
	}
	rel, err := filepath.Rel(f.cfg.Folder, folder)
	return err == nil && !strings.HasPrefix(rel, "..") && strings.Count(rel, string(filepath.Separator)) == 1
}

// sweepFolder brings those single files up to date that are in a folder.
func (f *Follower) sweepFolder(folder string, visit func(string)) {
	for i := range f.cfg.Files {
		in := &f.cfg.Files[i]
		if slices.ContainsFunc(in.Patterns, func(p string) bool {
			here, err := filepath.Match(filepath.Dir(p), folder)
			return err == nil && here
		}) {
			f.sweepFiles(in, visit, map[string]bool{})
		}
	}
}

func (f *Follower) isFile(path string) bool {
	info, err := os.Lstat(path)
	if err != nil {
		return false // deleted meanwhile
	}
	if info.Mode()&fs.ModeSymlink != 0 && !f.leadsToLogs(path) {
		return false
	}
	return !info.IsDir()
}

// rotated reports whether name is how logrotate and the like call an older base:
// base.1, base-20261123, base.2.gz.
func rotated(name, base string) bool {
	rest, ok := strings.CutPrefix(name, base)
	return ok && len(rest) > 1 && strings.ContainsRune(".-", rune(rest[0]))
}

// ours reports whether the file at path is one that was followed before.
func (f *Follower) ours(l *containerLog, path string) bool {
	info, err := os.Stat(path)
	if err != nil {
		return false
	}
	dev, ino, err := numbers(info)
	if err != nil {
		return false
	}
	if slices.ContainsFunc(l.gens, func(g *generation) bool {
		return g.dev == dev && g.ino == ino || g.path == path || g.path == strings.TrimSuffix(path, ".gz")
	}) {
		return true
	}
	if strings.HasSuffix(path, ".gz") {
		return false
	}
	prefix := identity(dev, ino)
	_, ok := f.book.Find(func(file, _ string) bool { return strings.HasPrefix(file, prefix) })
	return ok
}
