#!/usr/bin/env bash
# Builds the OpenTelemetry Collector of deploy/peers/otelcol and prints the path of
# the program, which is .cache/peers/otelcol/otelcol. The torture kit grades it and
# the benchmark measures it beside the collector.
#
# The first build takes some 3 minutes on two cores; afterwards it is a moment, for
# what was built is kept until the module's files change. It runs as the least
# urgent work of the machine, one package at a time.
#
# Needs: go.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=$(cd "$here/../.." && pwd)/.cache/peers/otelcol

say() { echo "otelcol: $*" >&2; }
die() { say "$*"; exit 1; }

command -v go >/dev/null || die "no go to build it with: install Go, or put the program at $out/otelcol"
key=$(cat "$here"/otelcol/{go.mod,go.sum,main.go} | sha256sum | cut -c1-16)
if [[ ! -x $out/otelcol || $(cat "$out/key" 2>/dev/null) != "$key" ]]; then
	mkdir -p "$out"
	say "building it (some minutes, once)"
	# Built beside and renamed, so that an interrupted build leaves no half of it.
	(cd "$here/otelcol" && CGO_ENABLED=0 GOFLAGS="-p=1 -buildvcs=false" nice -n 19 go build -trimpath -ldflags "-s -w" -o "$out/.otelcol" .) ||
		die "the build failed (its output is above)"
	mv "$out/.otelcol" "$out/otelcol"
	echo "$key" >"$out/key"
fi
echo "$out/otelcol"
