package kube

import (
	"reflect"

	"sigs.k8s.io/controller-runtime/pkg/client"
)

// Trim is what informers do to an object before they keep it.
func Trim(o client.Object) {
	for _, k := range kinds() {
		if reflect.TypeOf(k.object()) == reflect.TypeOf(o) {
			_, _ = k.transform(o) // never fails
		}
	}
}
