// Package authz decides whether a caller may do what it asks for.
//
// It is pure: a Policy is made by xdsclient out of the filters of a listener, and
// asked by the proxy for each request or connection.
package authz

// Policy is what a port asks of those who call it. Nil lets everybody in.
type Policy struct{}
