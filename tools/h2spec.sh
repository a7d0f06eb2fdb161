#!/usr/bin/env bash
# Runs the h2spec conformance suite against the ambassador port and the inbound
# port of real sidecars (deploy/apptest, TestH2Spec). h2spec is built once, into
# .cache/h2spec. A failure that is expected is listed there, with the reason.
set -euo pipefail
cd "$(dirname "$0")/.."
version=v2.2.1+incompatible
dir=$PWD/.cache/h2spec
if [ ! -x "$dir/h2spec" ]; then
	mkdir -p "$dir"
	echo "building h2spec $version (once)"
	(cd "$dir" && GOBIN=$dir go install "github.com/summerwind/h2spec/cmd/h2spec@$version")
fi
OUTRIGGER_H2SPEC=$dir/h2spec go test -count=1 ./deploy/apptest -run 'TestH2Spec' -v | grep -v -e '^=== '
