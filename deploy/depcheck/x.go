package depcheck

import (
	_ "github.com/containernetworking/cni/pkg/skel"
	_ "github.com/google/go-containerregistry/pkg/v1/tarball"
	_ "github.com/google/nftables"
	_ "github.com/vishvananda/netns"
	_ "helm.sh/helm/v4/pkg/chart/v2/loader"
	_ "helm.sh/helm/v4/pkg/engine"
	_ "k8s.io/client-go/kubernetes"
	_ "k8s.io/client-go/tools/leaderelection"
	_ "sigs.k8s.io/controller-runtime/pkg/cache"
	_ "sigs.k8s.io/controller-runtime/pkg/client"
	_ "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned"
	_ "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
)
