#!/usr/bin/env bash
# Runs every fuzz target of the module for a number of seconds each and ends
# with a line of the executions. Usage: tools/fuzz.sh SECONDS
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-20}
targets=0
while IFS=: read -r file target; do
	dir=./$(dirname "$file")
	printf '%-34s %s\n' "$target" "$dir"
	go test -run '^$' -fuzz "^$target\$" -fuzztime "${seconds}s" "$dir" | grep -e 'execs:' -e FAIL -e panic | tail -n 1
	targets=$((targets + 1))
done < <(git ls-files '*_test.go' | xargs grep -o '^func Fuzz[A-Za-z0-9_]*' | sed 's/func //')
echo "$targets fuzz targets ran for ${seconds}s each without a finding"
