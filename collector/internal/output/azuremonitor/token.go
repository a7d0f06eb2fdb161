package azuremonitor

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/internal/output/tlsfiles"
)

const (
	// maxToken bounds the answer to a token request in bytes.
	maxToken = 64 << 10
	// renewBefore is how long before its end a token is renewed, at most half its
	// life: in between a failure to renew does no harm.
	renewBefore = 5 * time.Minute
)

// tokens gets access tokens by the client credentials flow of OAuth 2.0 (RFC
// 6749, section 4.4), with the pod's own token as the client's assertion (RFC
// 7523, section 2.2) or with a client secret, and keeps one until shortly before
// its end. It is safe for concurrent use; of concurrent callers one asks.
type tokens struct {
	cfg    Config
	client *http.Client

	mu    sync.Mutex
	value string
	renew time.Time
	end   time.Time
}

// tokenError is a failure to get a token.
type tokenError struct {
	err       error
	permanent bool
}

func (e *tokenError) Error() string { return e.err.Error() }
func (e *tokenError) Unwrap() error { return e.err }

// get returns a token that is not refused, the value of one that the service did
// not take; empty without.
func (t *tokens) get(ctx context.Context, now time.Time, refused string) (string, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	valid := t.value != "" && t.value != refused && now.Before(t.end)
	if valid && now.Before(t.renew) {
		return t.value, nil
	}
	value, life, err := t.ask(ctx)
	if err != nil {
		if valid {
			t.renew = now.Add(min(time.Minute, t.end.Sub(now)))
			return t.value, nil
		}
		return "", err
	}
	t.value, t.end = value, now.Add(life)
	t.renew = t.end.Add(-min(renewBefore, life/2))
	return value, nil
}

func (t *tokens) ask(ctx context.Context) (value string, life time.Duration, err error) {
	const kind = "azuremonitor: access token"
	fail := func(permanent bool, format string, args ...any) error {
		return &tokenError{fmt.Errorf(kind+": "+format, args...), permanent}
	}
	form := url.Values{"grant_type": {"client_credentials"}, "client_id": {t.cfg.ClientID}, "scope": {strings.TrimSuffix(t.cfg.Audience, "/") + "/.default"}}
	if t.cfg.TokenFile != "" {
		s, err := tlsfiles.Secret(kind, "tokenFile", t.cfg.TokenFile)
		if err != nil {
			return "", 0, &tokenError{err, true}
		}
		form.Set("client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer")
		form.Set("client_assertion", s)
	} else {
		s, err := tlsfiles.Secret(kind, "clientSecretFile", t.cfg.ClientSecretFile)
		if err != nil {
			return "", 0, &tokenError{err, true}
		}
		form.Set("client_secret", s)
	}
	at := strings.TrimSuffix(t.cfg.AuthorityHost, "/") + "/" + url.PathEscape(t.cfg.TenantID) + "/oauth2/v2.0/token"
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, at, strings.NewReader(form.Encode()))
	if err != nil {
		return "", 0, fail(true, "%w", err)
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Accept", "application/json")
	resp, err := t.client.Do(req)
	if err != nil {
		return "", 0, fail(false, "%w", err)
	}
	defer func() { _ = resp.Body.Close() }() // read to its end or given up
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxToken))
	if err != nil {
		return "", 0, fail(false, "%w", err)
	}
	var answer struct {
		AccessToken string  `json:"access_token"`
		ExpiresIn   float64 `json:"expires_in"`
		TokenType   string  `json:"token_type"`
		Error       string  `json:"error"`
		Description string  `json:"error_description"`
	}
	broken := json.Unmarshal(data, &answer)
	switch {
	case resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode == http.StatusRequestTimeout || resp.StatusCode >= 500:
		return "", 0, fail(false, "%s answers status %d", t.cfg.AuthorityHost, resp.StatusCode)
	case resp.StatusCode != http.StatusOK:
		line, _, _ := strings.Cut(answer.Description, "\n")
		return "", 0, fail(true, "%s answers status %d: %s: %s: check tenantId, clientId and the federated credential (or clientSecretFile)",
			t.cfg.AuthorityHost, resp.StatusCode, shorten(answer.Error), shorten(strings.TrimSpace(line)))
	case broken != nil || answer.AccessToken == "" || !strings.EqualFold(answer.TokenType, "Bearer") || answer.ExpiresIn < 1:
		return "", 0, fail(false, "%s answers without a bearer token and its life", t.cfg.AuthorityHost)
	}
	return answer.AccessToken, time.Duration(min(answer.ExpiresIn, 24*60*60)) * time.Second, nil
}
