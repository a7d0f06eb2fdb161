#!/usr/bin/env bash
# Starts a real VictoriaMetrics on 127.0.0.1, runs the given command with
# OUTRIGGER_VM_URL set to it, and stops the server whatever becomes of the command:
#
#   deploy/peers/victoriametrics.sh go test -tags peers -run TestRealVictoriaMetrics ./collector/internal/output/influxdb/
#
# Without a command it prints the URL and serves until it is interrupted.
#
# The server speaks InfluxDB's write API. It checks no token, organisation or
# bucket and answers no Flux: it proves line protocol, gzip and batching, not
# credentials.
#
# -influxSkipSingleField keeps names as they are: without it the field's name
# is added (up_value).
#
# Needs: go, curl. The binary is built once and stays in .cache/peers.
set -euo pipefail

version=${OUTRIGGER_VM_VERSION:-v1.147.0}
deadline=${OUTRIGGER_VM_START_SECONDS:-30}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cache=$root/.cache/peers
binary=$cache/victoria-metrics-$version

say() { echo "victoriametrics: $*" >&2; }
die() { say "$*"; exit 1; }

command -v curl >/dev/null || die "no curl: it is how this script sees that the server is ready"

if [[ ! -x $binary ]]; then
	command -v go >/dev/null || die "no go to build the server with: install Go, or put the binary at $binary"
	mkdir -p "$cache"
	# Built beside and renamed, so that an interrupted build leaves no half of it.
	fresh=$(mktemp -d "$cache/build.XXXXXX")
	say "building $version (a minute or so, once)"
	GOBIN=$fresh GOFLAGS=-trimpath go install "github.com/VictoriaMetrics/VictoriaMetrics/app/victoria-metrics@$version" ||
		{ rm -rf "$fresh"; die "the build failed (its output is above)"; }
	mv "$fresh/victoria-metrics" "$binary"
	rmdir "$fresh"
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/outrigger-vm.XXXXXX")
# shellcheck source=deploy/peers/stop.bash
. "$root/deploy/peers/stop.bash"

# The server does not say which port the kernel gave it, so a port is tried, and
# another if it was taken in between.
url=
for _ in $(seq 5); do
	port=$((20000 + RANDOM % 12000))
	"$binary" -httpListenAddr="127.0.0.1:$port" -storageDataPath="$work/data" \
		-search.latencyOffset=0s -influxSkipSingleField -retentionPeriod=100y -memory.allowedBytes=128MB \
		>"$work/out" 2>&1 </dev/null &
	server=$!
	for _ in $(seq $((deadline * 20))); do
		kill -0 "$server" 2>/dev/null || break
		if [[ $(curl -sf "http://127.0.0.1:$port/health" 2>/dev/null) == OK ]]; then
			url=http://127.0.0.1:$port
			break
		fi
		sleep 0.05
	done
	# Another server's answer on the same port is not ours.
	if [[ -n $url ]] && kill -0 "$server" 2>/dev/null; then
		break
	fi
	url=
	kill -0 "$server" 2>/dev/null && break
	wait "$server" 2>/dev/null || true
done
[[ -n $url ]] || { tail -n 40 "$work/out" >&2; die "not ready after $deadline s (its output is above; OUTRIGGER_VM_START_SECONDS gives it longer)"; }
say "$version ready at $url"

export OUTRIGGER_VM_URL=$url
if [[ $# -gt 0 ]]; then
	"$@"
else
	echo "$url"
	wait "$server"
fi
