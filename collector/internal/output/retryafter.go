package output

import (
	"net/http"
	"strconv"
	"time"
)

// RetryAfter reads the header of RFC 9110, section 10.2.3: seconds or a date; 0 if
// it is neither. It is at most a day.
func RetryAfter(value string, now time.Time) time.Duration {
	if n, err := strconv.Atoi(value); err == nil {
		return max(0, time.Duration(min(n, 24*60*60))*time.Second)
	}
	if t, err := http.ParseTime(value); err == nil {
		return min(max(0, t.Sub(now)), 24*time.Hour)
	}
	return 0
}
