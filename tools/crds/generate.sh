#!/usr/bin/env bash
# Writes the CRDs (deploy/crds) and the deep copies from the Go types of
# control-plane/api/v1alpha1, whose markers carry the validation:
#
#   go generate ./control-plane/api/...
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
tool=$root/.cache/tools/controller-gen
if [[ ! -x $tool || $root/tools/crds/go.mod -nt $tool ]]; then
	mkdir -p "$root/.cache/tools"
	(cd "$root/tools/crds" && go build -trimpath -o "$tool" sigs.k8s.io/controller-tools/cmd/controller-gen)
fi
cd "$root"
"$tool" object paths=./control-plane/api/v1alpha1
rm -rf deploy/crds && mkdir -p deploy/crds
"$tool" crd:maxDescLen=400 paths=./control-plane/api/v1alpha1 output:crd:dir=deploy/crds
rm deploy/crds/outrigger.dev_workloads.yaml # of a laptop only
