package testbed_test

import (
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/outrigger-mesh/outrigger/deploy/testbed"
)

var server *testbed.Server

func TestMain(m *testing.M) { testbed.Main(m, func(s *testbed.Server) { server = s }) }

// The API server answers, and again after an outage, with what it knew.
func TestOutage(t *testing.T) {
	s := server.Need(t)
	client, err := kubernetes.NewForConfig(s.Config)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.CoreV1().Namespaces().Get(t.Context(), "kube-system", metav1.GetOptions{}); err != nil {
		t.Fatal(err)
	}
	s.StopAPI()
	if _, err := client.CoreV1().Namespaces().Get(t.Context(), "kube-system", metav1.GetOptions{}); err == nil {
		t.Error("an answer during the outage")
	}
	if err := s.StartAPI(); err != nil {
		t.Fatal(err)
	}
	if _, err := client.CoreV1().Namespaces().Get(t.Context(), "kube-system", metav1.GetOptions{}); err != nil {
		t.Error(err)
	}
}
