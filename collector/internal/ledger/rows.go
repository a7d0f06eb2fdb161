package ledger

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// Limits of the rows. What is older, and what is more, is added up in the row
// without owner and hour, so that the rows always add up to the whole.
const (
	MaxRows  = 10_000
	KeepRows = 24 // hours
)

type rowKey struct {
	owner string
	hour  int64
}

// Row is what was seen of one owner within one hour of the collector's clock: bytes that were
// written, and bytes that were settled, which may have been written before.
// Pending is the difference of the two and can be negative; over all rows it is
// what is pending.
type Row struct {
	Owner string    `json:"owner"` // namespace/pod; empty for what is too old to be told apart
	Hour  time.Time `json:"hour"`  // its begin, UTC; zero for what is too old
	Totals
}

// Clock tells the ledger what time it is. Rows that are too old go.
func (l *Ledger) Clock(now time.Time) {
	hour := now.Unix() / 3600
	if hour == l.hour {
		return
	}
	l.hour = hour
	for k, s := range l.rows {
		if k.hour != 0 && k.hour <= hour-KeepRows {
			l.fold(k, s)
		}
	}
}

func (l *Ledger) fold(k rowKey, s *sums) {
	old := l.rows[rowKey{}]
	if old == nil {
		old = &sums{}
		l.rows[rowKey{}] = old
	}
	old.add(s)
	delete(l.rows, k)
}

// row is the account's row of this hour.
func (l *Ledger) row(a *account) *sums {
	k := rowKey{a.owner, l.hour}
	s := l.rows[k]
	if s != nil {
		return s
	}
	if len(l.rows) >= MaxRows {
		k = rowKey{}
		if s = l.rows[k]; s != nil {
			return s
		}
	}
	s = &sums{}
	l.rows[k] = s
	return s
}

// Rows returns all rows by hour and owner, the oldest first.
func (l *Ledger) Rows() []Row {
	out := make([]Row, 0, len(l.rows))
	for k, s := range l.rows {
		r := Row{Owner: k.owner, Totals: s.totals(s.written - s.taken())}
		if k.hour != 0 {
			r.Hour = time.Unix(k.hour*3600, 0).UTC()
		}
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b Row) int {
		return cmp.Or(a.Hour.Compare(b.Hour), cmp.Compare(a.Owner, b.Owner))
	})
	return out
}

// all is the sum of all accounts, closed ones included.
func (l *Ledger) all() (all sums) {
	all.add(&l.past)
	for _, a := range l.files {
		all.add(&a.sums)
	}
	return all
}

// checkRows returns an error if the rows do not add up to the accounts.
func (l *Ledger) checkRows() error {
	var rows sums
	for _, s := range l.rows {
		rows.add(s)
	}
	all := l.all()
	if !rows.equal(&all) {
		return fmt.Errorf("the rows by owner and hour add up to %+v, the accounts to %+v", rows.totals(rows.written-rows.taken()), all.totals(all.written-all.taken()))
	}
	return nil
}
