package proxy

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// script of places: what was opened and closed, in order.
type placesScript struct {
	places
	happened []string
	full     int // that many open calls fail
}

func newPlacesScript(most int) *placesScript {
	s := &placesScript{}
	s.places = places{
		max: most,
		open: func(pl *place) error {
			if s.full > 0 {
				s.full--
				return errors.New("too many")
			}
			s.happened = append(s.happened, "+"+pl.key)
			return nil
		},
		close: func(pl *place) { s.happened = append(s.happened, "-"+pl.key) },
	}
	return s
}

func (s *placesScript) is(t *testing.T, want ...string) {
	t.Helper()
	if diff := cmp.Diff(want, s.happened); diff != "" {
		t.Error(diff)
	}
	s.happened = nil
}

func address(n int) netip.AddrPort { return netip.MustParseAddrPort(fmt.Sprintf("10.0.0.%d:80", n)) }

func second(n int) time.Time { return time.Unix(1000+int64(n), 0) }

func TestPlacesMakeRoomForWhatIsUsed(t *testing.T) {
	s := newPlacesScript(3)
	use := func(n, at int) *place {
		t.Helper()
		pl := s.take(address(n), false, second(at))
		if pl == nil {
			t.Fatalf("no room for %s", address(n))
		}
		s.leave(pl, second(at))
		return pl
	}
	use(1, 1)
	use(2, 2)
	s.isForeign(use(3, 3), true)
	use(1, 4)
	s.is(t, "+10.0.0.1:80", "+10.0.0.2:80", "+10.0.0.3:80")
	s.isForeign(use(4, 5), true)
	s.is(t, "-10.0.0.3:80", "+10.0.0.4:80") // foreign, though another was used longer ago
	use(5, 6)
	s.is(t, "-10.0.0.4:80", "+10.0.0.5:80")
	use(6, 7)
	s.is(t, "-10.0.0.2:80", "+10.0.0.6:80") // the one used longest ago

	var held []*place
	for _, n := range []int{1, 5, 6} {
		held = append(held, s.take(address(n), false, second(8)))
	}
	if pl := s.take(address(7), false, second(9)); pl != nil {
		t.Error("there was room, and all are in use")
	}
	if pl := s.take(address(7), true, second(9)); pl == nil {
		t.Error("what is always served was not")
	}
	s.is(t, "+10.0.0.7:80")
	for _, pl := range held[1:] {
		s.leave(pl, second(20))
	}
	s.sweep(second(20)) // used since
	s.is(t)
	s.sweep(second(21))
	if n := s.len(); n != 2 { // one is in use, one is always served and in use
		t.Errorf("%d are left", n)
	}
}

func TestPlacesMakeRoomWhereAskingIsRefused(t *testing.T) {
	s := newPlacesScript(10)
	s.leave(s.take(address(1), false, second(1)), second(1))
	s.full = 1
	if s.take(address(2), false, second(2)) == nil {
		t.Error("another one could have gone")
	}
	s.is(t, "+10.0.0.1:80", "-10.0.0.1:80", "+10.0.0.2:80")
	s.full = 1
	if s.take(address(3), false, second(3)) != nil {
		t.Error("nothing could have gone")
	}
	s.is(t)
}
