package http2

import "time"

// TestEncoder is the encoder, for tests from outside.
type TestEncoder struct{ e encoder }

func NewTestEncoder() *TestEncoder { return &TestEncoder{e: newEncoder()} }

func (t *TestEncoder) SetMax(n uint32)                      { t.e.setMax(n) }
func (t *TestEncoder) Begin(dst []byte) []byte              { return t.e.begin(dst) }
func (t *TestEncoder) Field(dst, name, value []byte) []byte { return t.e.field(dst, name, value) }

// TestMeter is a meter, for tests from outside.
type TestMeter struct{ m meter }

func (t *TestMeter) Take(now time.Time, burst, second float64) bool {
	return t.m.take(now, &ration{burst: burst, second: second})
}

func (t *TestMeter) Earn(n, burst float64) { t.m.earn(n, &ration{burst: burst}) }
