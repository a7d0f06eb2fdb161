package tail

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// The spool keeps generations from being deleted before they are settled: a
// second name (a hard link) for each of them, in a folder of our own on the same
// file system. It copies nothing, and survives kubelet's deletion and our own
// restart. The folder is laid out as the logs are:
//
//	<spool>/<namespace>_<pod>_<uid>/<container>/<restart>.log@<id>
//	<spool>/<namespace>_<pod>_<uid>/<container>/<restart>.log@<id>@apart
//
// The second form says that the generation does not follow the one before (succession), which
// the next process could not find out.
// A name goes when everything of its generation is settled and the checkpoint
// that says so is on the disk, so that a crash in between forgets nothing.

// leaving is a generation that was read to its end and is deleted; only its link
// keeps it until it is settled.
type leaving struct {
	id, link string
}

// keep gives the generation a name in the spool.
func (f *Follower) keep(l *containerLog, g *generation) {
	if f.cfg.Spool == "" || l.input != nil || g.link != "" || g.gone || strings.HasSuffix(g.path, ".gz") || f.noSpool {
		return
	}
	name := l.linkName(g)
	link := f.linkPath(l, name)
	folder := filepath.Dir(link)
	err := os.Link(g.path, link)
	if errors.Is(err, fs.ErrNotExist) {
		if made := os.MkdirAll(folder, 0o700); made != nil {
			err = fmt.Errorf("%w: %s", fs.ErrPermission, made.Error())
		} else {
			err = os.Link(g.path, link)
		}
	}
	switch {
	case err == nil, errors.Is(err, fs.ErrExist):
		// The path may have been given to another file meanwhile.
		if info, err := os.Lstat(link); err == nil {
			if dev, ino, err := numbers(info); err == nil && dev == g.dev && ino == g.ino {
				g.link, f.linked = name, true
				return
			}
		}
		f.unlink(link)
	case errors.Is(err, fs.ErrNotExist): // deleted meanwhile; the open file is all there is
	case errors.Is(err, fs.ErrPermission) && f.linked, errors.Is(err, syscall.EMLINK):
		f.metrics.Errors.WithLabelValues("link").Inc() // this one is not ours to link; others are
	case errors.Is(err, syscall.EXDEV), errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS), errors.Is(err, syscall.ENOTSUP):
		f.noSpool = true
		f.metrics.Errors.WithLabelValues("link").Inc()
		f.log.Warn("log files cannot be kept by a second name, so one that is deleted while the collector is away is lost; put logs.spool on the file system of the logs, into a folder that this user may write to",
			"file.path", f.cfg.Spool, "error.message", err.Error())
	default:
		f.failed("link", g.path, err)
	}
}

const apartMark = "@apart"

func (l *containerLog) linkName(g *generation) string {
	name := filepath.Base(l.path) + "@" + g.id
	if g.after == apart {
		name += apartMark
	}
	return name
}

// linkPath is the path of a name in the spool; empty for none.
func (f *Follower) linkPath(l *containerLog, name string) string {
	if name == "" {
		return ""
	}
	container := filepath.Dir(l.path)
	return filepath.Join(f.cfg.Spool, filepath.Base(filepath.Dir(container)), filepath.Base(container), name)
}

// succeed notes whether the generation follows the one before, in the spool too.
func (f *Follower) succeed(l *containerLog, g *generation, s succession) {
	if g.after == s {
		return
	}
	g.after = s
	if g.link == "" {
		return
	}
	if name := l.linkName(g); name != g.link {
		if err := os.Rename(f.linkPath(l, g.link), f.linkPath(l, name)); err != nil {
			f.failed("rename", g.link, err)
			return
		}
		g.link = name
	}
}

// unlink removes a name from the spool.
func (f *Follower) unlink(link string) {
	if link == "" {
		return
	}
	if err := os.Remove(link); err != nil && !errors.Is(err, fs.ErrNotExist) {
		f.failed("unlink", link, err)
		return
	}
	// Folders go when they are empty.
	container := filepath.Dir(link)
	if os.Remove(container) == nil {
		_ = os.Remove(filepath.Dir(container))
	}
}

// release lets those generations go that are settled.
func (f *Follower) release() {
	kept := f.leaving[:0]
	for _, x := range f.leaving {
		if !f.book.Settled(x.id) {
			kept = append(kept, x)
			continue
		}
		f.unlink(x.link)
		f.book.Gone(x.id)
	}
	clear(f.leaving[len(kept):])
	f.leaving = kept
	for g, l := range f.spent {
		if !g.gone && f.book.Settled(g.id) {
			f.unlink(f.linkPath(l, g.link))
			g.link = ""
			delete(f.spent, g)
		}
	}
}

// restore finds what an earlier process kept. It comes before the first sweep, so
// that the kept generations of a log are older than what the sweep finds.
func (f *Follower) restore() {
	if f.cfg.Spool == "" {
		return
	}
	complete := true
	for _, pod := range f.list(f.cfg.Spool, nil, &complete) {
		for _, container := range f.list(filepath.Join(f.cfg.Spool, pod), nil, &complete) {
			folder := filepath.Join(f.cfg.Spool, pod, container)
			entries, err := os.ReadDir(folder)
			if err != nil {
				f.failed("list", folder, err)
				continue
			}
			for _, e := range entries {
				name, id, ok := strings.Cut(strings.TrimSuffix(e.Name(), apartMark), "@")
				if _, _, log := logName(name); !ok || !log || !e.Type().IsRegular() {
					f.skip(filepath.Join(folder, e.Name()), "not_ours")
					continue
				}
				f.restoreOne(filepath.Join(f.cfg.Folder, pod, container, name), filepath.Join(folder, e.Name()), id)
			}
		}
	}
}

// time is how the first line begins.
func (g *generation) time() []byte {
	b, err := g.head(make([]byte, len("2026-11-23T02:00:00.000000000Z")))
	if err != nil || len(b) == 0 {
		return []byte{'~'} // the youngest has none yet
	}
	return b
}

func (f *Follower) restoreOne(live, link, id string) {
	info, err := os.Lstat(link)
	if err != nil {
		f.failed("stat", link, err)
		return
	}
	dev, ino, err := numbers(info)
	if err != nil {
		f.failed("stat", link, err)
		return
	}
	l := f.logOf(live)
	// Whether it still has a name of kubelet's is seen by the sweep: find goes by
	// the inode. Until then it counts as deleted.
	g := &generation{path: l.path, dev: dev, ino: ino, link: strings.Clone(filepath.Base(link)), gone: true, restored: true, modified: stampOf(info.ModTime()), after: adjacent}
	if strings.HasSuffix(link, apartMark) {
		g.after = apart
	}
	if err := f.open(l, g); err != nil {
		f.failed("open", link, err)
		return
	}
	if err := f.identify(l, g, true); err != nil {
		f.failed("read", link, err)
	}
	if g.id != "" && g.id != id {
		f.log.Warn("a kept log file is not the one that its name says; it is read as what it is", "file.path", link, "outrigger.file", g.id)
	}
	l.gens = append(l.gens, g)
	slices.SortStableFunc(l.gens, func(a, b *generation) int {
		if c := cmp.Compare(a.modified, b.modified); c != 0 {
			return c
		}
		return bytes.Compare(a.time(), b.time()) // the clock of a file system goes in steps of milliseconds
	})
	f.gone[g] = l
	f.enqueue(l)
}
