#!/usr/bin/env bash
# Tests the collector's outputs against real servers, which it installs into
# .cache/peers, starts on loopback and stops again. What cannot be had on this
# machine is said and counted, never passed over.
set -uo pipefail
cd "$(dirname "$0")/.."
failed=0 skipped=0 passed=0
try() { # name, script, test pattern, package
	echo "== $1"
	"$2" go test -count=1 -tags peers -run "$3" -v "$4"
	case $? in
	0) passed=$((passed + 1)) ;;
	75) skipped=$((skipped + 1)); echo "SKIPPED: $1 cannot be had here" ;;
	*) failed=$((failed + 1)) ;;
	esac
}
directly() { "$@"; } # for peers that the test installs and starts itself
try "Elasticsearch" deploy/peers/elasticsearch.sh TestReal ./collector/internal/output/elasticsearch
try "VictoriaMetrics" deploy/peers/victoriametrics.sh TestReal ./collector/internal/output/influxdb
try "FluentServer of the fluentd project" directly TestReal ./collector/internal/output/fluentd
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
