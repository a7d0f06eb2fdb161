#!/usr/bin/env bash
# Tests the collector's outputs against real servers, which it installs into
# .cache/peers, starts on loopback and stops again. Needs Maven and Java 17 for
# Elasticsearch, npm for the fluentd project's server; VictoriaMetrics is built
# from its Go module, the OpenTelemetry Collector by deploy/peers/otelcol.sh
# beforehand. What is missing is said and counted.
set -uo pipefail
cd "$(dirname "$0")/.."
passed=0 failed=0 skipped=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT
judge() { # name, command...
	echo "== $1"
	shift
	"$@" 2>&1 | tee "$log" | grep -v '^=== '
	if [ "${PIPESTATUS[0]}" -ne 0 ]; then
		failed=$((failed + 1))
	elif grep -q -e '^--- SKIP' "$log"; then
		skipped=$((skipped + 1))
	else
		passed=$((passed + 1))
	fi
}
try() { # name, package, script that starts the server and runs the rest (or none)
	judge "$1" ${3:-} go test -count=1 -tags peers -run TestReal -v "$2"
}
try "Elasticsearch" ./collector/internal/output/elasticsearch deploy/peers/elasticsearch.sh
OUTRIGGER_ES_SECURITY=true try "Elasticsearch with security" ./collector/internal/output/elasticsearch deploy/peers/elasticsearch.sh
# Judged by reading the real server's index, after faults that the kit puts in between.
# shellcheck disable=SC2016
judge "Elasticsearch, with SIGKILLs and outages" deploy/peers/elasticsearch.sh bash -c \
	'make --no-print-directory torture TORTURE="--output elasticsearch --elasticsearch $OUTRIGGER_ES_URL --run rotate-2-down,swallow,sigkill"'
try "VictoriaMetrics" ./collector/internal/output/influxdb deploy/peers/victoriametrics.sh
try "FluentServer of the fluentd project, OpenTelemetry Collector (forward)" ./collector/internal/output/fluentd
try "go-lumber, Elastic's server for Beats" ./collector/internal/output/logstash
try "OpenTelemetry Collector (OTLP)" ./collector/internal/output/otlp
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
