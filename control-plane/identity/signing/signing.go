// Package signing is what a workload and the authority of its mesh say to each
// other when a certificate is asked for: one gRPC call whose messages are
// google.protobuf.Struct, so that a client needs no generated code of ours.
//
//	/outrigger.dev.v1alpha1.Authority/Sign
//	  request   {csr: PEM}                              PKCS #10 (RFC 2986)
//	  response  {certificate_chain: PEM, roots: PEM}    the workload's certificate first
//	  metadata  authorization: Bearer <token>           absent where the client's certificate proves it
//
// It is a contract: it knows the form of the messages and their limits, and
// neither who may have which certificate nor how one is checked.
package signing

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"

	"google.golang.org/protobuf/types/known/structpb"
)

// Names of the call.
const (
	Service = "outrigger.dev.v1alpha1.Authority"
	Method  = "/" + Service + "/Sign"
	// Authorization is the key of the metadata that holds the token.
	Authorization = "authorization"
	bearer        = "Bearer "
)

// Limits of the messages, in bytes.
const (
	MaxCSR      = 8 << 10
	MaxToken    = 16 << 10 // a projected token of Kubernetes has 1 to 2 KiB
	MaxResponse = 256 << 10
	// MaxCertificates in a chain or among the roots.
	MaxCertificates = 32
)

// Bearer is the value of the metadata for a token.
func Bearer(token string) string { return bearer + token }

// Token returns the token in a value of the metadata; ok is false where the
// value is of another scheme, empty or longer than MaxToken.
func Token(value string) (token string, ok bool) {
	token, ok = strings.CutPrefix(value, bearer)
	return token, ok && token != "" && len(token) <= MaxToken
}

// Request asks for a certificate.
type Request struct {
	// CSR is the request in DER.
	CSR []byte
}

// Response is a certificate.
type Response struct {
	// Chain begins with the workload's certificate and leads to, without it, a
	// root.
	Chain []*x509.Certificate
	// Roots are all that peers may be rooted in.
	Roots []*x509.Certificate
}

const (
	fieldCSR    = "csr"
	fieldChain  = "certificate_chain"
	fieldRoots  = "roots"
	typeCSR     = "CERTIFICATE REQUEST"
	typeCert    = "CERTIFICATE"
	pemOverhead = 2 // base64 and lines make less than twice as much
)

// Encode writes the request.
func (r Request) Encode() *structpb.Struct {
	return message(map[string][]byte{fieldCSR: pem.EncodeToMemory(&pem.Block{Type: typeCSR, Bytes: r.CSR})})
}

// DecodeRequest reads what Encode writes. That the CSR means something is not
// checked.
func DecodeRequest(s *structpb.Struct) (Request, error) {
	text := s.GetFields()[fieldCSR].GetStringValue()
	if len(text) > pemOverhead*MaxCSR {
		return Request{}, fmt.Errorf("csr: %d bytes; at most %d", len(text), pemOverhead*MaxCSR)
	}
	block, rest := pem.Decode([]byte(text))
	if block == nil || block.Type != typeCSR || strings.TrimSpace(string(rest)) != "" {
		return Request{}, errors.New("csr: it is not one PEM block CERTIFICATE REQUEST")
	}
	if len(block.Bytes) > MaxCSR {
		return Request{}, fmt.Errorf("csr: %d bytes; at most %d", len(block.Bytes), MaxCSR)
	}
	return Request{CSR: block.Bytes}, nil
}

// Encode writes the response.
func (r Response) Encode() *structpb.Struct {
	return message(map[string][]byte{fieldChain: EncodeCertificates(r.Chain), fieldRoots: EncodeCertificates(r.Roots)})
}

// DecodeResponse reads what Encode writes: at least one certificate in each
// field.
func DecodeResponse(s *structpb.Struct) (Response, error) {
	var r Response
	for _, f := range []struct {
		name string
		out  *[]*x509.Certificate
	}{{fieldChain, &r.Chain}, {fieldRoots, &r.Roots}} {
		text := s.GetFields()[f.name].GetStringValue()
		if len(text) > MaxResponse {
			return Response{}, fmt.Errorf("%s: %d bytes; at most %d", f.name, len(text), MaxResponse)
		}
		var err error
		if *f.out, err = DecodeCertificates([]byte(text)); err != nil {
			return Response{}, fmt.Errorf("%s: %w", f.name, err)
		}
	}
	return r, nil
}

func message(in map[string][]byte) *structpb.Struct {
	out := &structpb.Struct{Fields: map[string]*structpb.Value{}}
	for name, text := range in {
		out.Fields[name] = structpb.NewStringValue(string(text))
	}
	return out
}

// EncodeCertificates writes certificates as PEM, one after the other.
func EncodeCertificates(in []*x509.Certificate) []byte {
	var out []byte
	for _, c := range in {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: typeCert, Bytes: c.Raw})...)
	}
	return out
}

// DecodeCertificates reads a sequence of PEM blocks CERTIFICATE: at least one,
// at most MaxCertificates, and nothing else.
func DecodeCertificates(text []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for len(strings.TrimSpace(string(text))) > 0 {
		var block *pem.Block
		block, text = pem.Decode(text)
		switch {
		case block == nil:
			return nil, errors.New("it is not PEM")
		case block.Type != typeCert:
			return nil, fmt.Errorf("it holds a PEM block %.40q; only CERTIFICATE may be there", block.Type)
		case len(out) == MaxCertificates:
			return nil, fmt.Errorf("it holds more than %d certificates", MaxCertificates)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(out)+1, err)
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, errors.New("it holds no certificate")
	}
	return out, nil
}
