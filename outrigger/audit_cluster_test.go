package main

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/outrigger-mesh/outrigger/deploy/testbed"
	"github.com/outrigger-mesh/outrigger/injector/audit"
	"github.com/outrigger-mesh/outrigger/injector/patch"
)

var server *testbed.Server

func TestMain(m *testing.M) { testbed.Main(m, func(s *testbed.Server) { server = s }) }

// outrigger audit, asked of a real API server: the exit code and both formats.
func TestAudit(t *testing.T) {
	s := server.Need(t)
	client, err := kubernetes.NewForConfig(s.Config)
	if err != nil {
		t.Fatal(err)
	}
	file := clientcmdapi.NewConfig()
	file.Clusters["c"] = &clientcmdapi.Cluster{Server: s.Config.Host, CertificateAuthorityData: s.Config.CAData}
	file.AuthInfos["u"] = &clientcmdapi.AuthInfo{ClientCertificateData: s.Config.CertData, ClientKeyData: s.Config.KeyData}
	file.Contexts["x"] = &clientcmdapi.Context{Cluster: "c", AuthInfo: "u"}
	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	if err := clientcmd.WriteToFile(*file, kubeconfig); err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) (out, diag string, err error) {
		t.Helper()
		var o, d bytes.Buffer
		err = execute(t.Context(), append([]string{"audit", "--kubeconfig=" + kubeconfig, "--context=x"}, args...), nil, &o, &d)
		return o.String(), d.String(), err
	}
	out, diag, err := run()
	if err != nil || !strings.HasPrefix(out, "0 pods meshed, 0 should be") || !strings.Contains(diag, "say which is new with --image") {
		t.Errorf("an empty cluster: %v\n%s%s", err, out, diag)
	}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "audited", Labels: map[string]string{patch.LabelInjection: "enabled"}}}
	if _, err := client.CoreV1().Namespaces().Create(t.Context(), ns, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "web"}, Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Image: "i"}}}}
	if _, err := client.CoreV1().Pods("audited").Create(t.Context(), pod, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	out, diag, err = run("-n", "audited", "--image=outrigger/sidecar:1")
	if err == nil || err.Error() != "1 pod should be meshed and is not" || !strings.Contains(out, "audited    web  missed  kubectl -n audited get pod web -o yaml | kubectl replace --force -f -") || diag != "" {
		t.Errorf("a pod without sidecar: %v\n%s%s", err, out, diag)
	}
	out, _, err = run("-o", "json")
	var report audit.Report
	if jsonErr := json.Unmarshal([]byte(out), &report); err == nil || jsonErr != nil || len(report.Findings) != 1 || report.Findings[0].Cause != audit.Missed || report.Findings[0].UID == "" {
		t.Errorf("as JSON: %v, %v\n%s", err, jsonErr, out)
	}
	if _, _, err := run("-n", "nowhere"); err == nil || !strings.Contains(err.Error(), `namespaces "nowhere" not found`) {
		t.Errorf("no namespace: %v", err)
	}
}
