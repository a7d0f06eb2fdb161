package ledger

import "testing"

// Written is what the file system says, pending what the position leaves, and
// acknowledged and dropped are counted: a count that is wrong shows in the audit.
func TestAnAccountCanFailToClose(t *testing.T) {
	l := New()
	l.Open("f", "/0.log", "shop/cart-0")
	l.Written("f", 100)
	l.Settle("f", Span{0, 40}, Acknowledged)
	l.files["f"].acknowledged.bytes -= 10 // as a bug would
	for _, s := range []Totals{l.Total(), l.Files()[0].Totals} {
		if s.Written == s.Acknowledged+s.Pending || s.Pending != 60 {
			t.Errorf("an account with 10 bytes on no side is %+v", s)
		}
	}
	if l.Check() == nil {
		t.Error("Check finds nothing")
	}
}
