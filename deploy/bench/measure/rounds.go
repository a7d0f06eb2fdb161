package measure

import "slices"

// Rounds are the values of one figure, one a round, in the order in which they
// were taken; a round that failed has none and must not be here.
type Rounds []float64

// Median is the middle value, the mean of both where there are two; zero of
// nothing.
func (r Rounds) Median() float64 {
	if len(r) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(r))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// Spread is the smallest and the largest value.
func (r Rounds) Spread() (least, most float64) {
	if len(r) == 0 {
		return 0, 0
	}
	return slices.Min(r), slices.Max(r)
}

// Ratio compares two peers: the ratio of their medians, and the smallest and
// largest ratio of a round. Rounds are interleaved, so that what disturbed the
// machine in a round disturbed both. All are zero where one has no value.
func Ratio(a, b Rounds) (ratio, least, most float64) {
	if len(a) == 0 || len(b) == 0 || b.Median() == 0 {
		return 0, 0, 0
	}
	var per Rounds
	for i := range min(len(a), len(b)) {
		if b[i] != 0 {
			per = append(per, a[i]/b[i])
		}
	}
	least, most = per.Spread()
	return a.Median() / b.Median(), least, most
}
