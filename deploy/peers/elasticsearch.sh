#!/usr/bin/env bash
# Starts a real Elasticsearch on 127.0.0.1, runs the given command with
# OUTRIGGER_ES_URL set to it, and stops the server whatever becomes of the command:
#
#   deploy/peers/elasticsearch.sh go test -tags peers -run TestRealElasticsearch ./collector/internal/output/elasticsearch/
#
# OUTRIGGER_ES_SECURITY=true starts it with security, without TLS, and two users of
# the password outrigger-peer: admin, who may do everything, and shipper, who may
# only do what the collector needs at least. API keys need modules that are
# missing here.
#
# Without a command it prints the URL and serves until it is interrupted.
#
# The server is Elastic's own integration-test distribution, an artifact of
# Maven Central: the real server (bulk, search, mappings, index templates), one
# node, without most of the plug-in modules. What a test needs and this build
# lacks, the test must say and skip.
#
# Needs: Java 17 or newer (JAVA_HOME, or java on PATH), mvn for the first run,
# unzip or python3, curl. Everything that is fetched stays in .cache/peers.
set -euo pipefail

version=${OUTRIGGER_ES_VERSION:-8.19.7}
heap=${OUTRIGGER_ES_HEAP:-512m}
deadline=${OUTRIGGER_ES_START_SECONDS:-240}
security=${OUTRIGGER_ES_SECURITY:-false}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cache=$root/.cache/peers
home=$cache/elasticsearch-$version

say() { echo "elasticsearch: $*" >&2; }
die() { say "$*"; exit 1; }

if [[ -z ${JAVA_HOME:-} ]]; then
	java=$(command -v java) || die "no java: install a JRE 17 or newer, or set JAVA_HOME"
	JAVA_HOME=$(dirname "$(dirname "$(readlink -f "$java")")")
fi
[[ -x $JAVA_HOME/bin/java ]] || die "JAVA_HOME=$JAVA_HOME holds no bin/java"
command -v curl >/dev/null || die "no curl: it is how this script sees that the server is ready"

if [[ ! -x $home/bin/elasticsearch ]]; then
	mkdir -p "$cache"
	zip=$cache/elasticsearch-$version.zip
	if [[ ! -s $zip ]]; then
		command -v mvn >/dev/null || die "no mvn to fetch the distribution: install maven, or put elasticsearch-$version.zip (integ-test-zip) into $cache"
		say "fetching the integration-test distribution $version (about 95 MB)"
		mvn -q -B dependency:copy \
			-Dartifact="org.elasticsearch.distribution.integ-test-zip:elasticsearch:$version:zip" \
			-DoutputDirectory="$cache"
	fi
	# Unpacked beside and renamed, so that an interrupted run leaves no half of it.
	fresh=$(mktemp -d "$cache/unpack.XXXXXX")
	if command -v unzip >/dev/null; then
		unzip -q "$zip" -d "$fresh"
	else
		python3 -m zipfile -e "$zip" "$fresh"
		chmod +x "$fresh/elasticsearch-$version"/bin/*
	fi
	chmod -R a+rX "$fresh"
	rm -rf "$home"
	mv "$fresh/elasticsearch-$version" "$home"
	rmdir "$fresh"
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/outrigger-es.XXXXXX")
# shellcheck source=deploy/peers/stop.bash
. "$root/deploy/peers/stop.bash"

mkdir "$work/data" "$work/logs" "$work/tmp"
cp -r "$home/config" "$work/config"
cat >"$work/config/elasticsearch.yml" <<YML
cluster.name: outrigger-peer
node.name: peer
path.data: $work/data
path.logs: $work/logs
discovery.type: single-node
xpack.security.enabled: $security
# Small, so that a test of too large requests is cheap.
http.max_content_length: 16mb
http.host: 127.0.0.1
http.port: 9200-9400
transport.host: 127.0.0.1
transport.port: 9500-9700
# A test machine's disk may be fuller than the watermarks allow.
cluster.routing.allocation.disk.threshold_enabled: false
YML

as_admin=()
if [[ $security == true ]]; then
	as_admin=(-u admin:outrigger-peer)
	cat >>"$work/config/elasticsearch.yml" <<YML
xpack.security.enrollment.enabled: false
xpack.security.autoconfiguration.enabled: false
xpack.security.http.ssl.enabled: false
xpack.security.transport.ssl.enabled: false
YML
	hash='$2a$04$YXoLHrXvSvmJk3FxQtN2m.VBzv/vU8gQDT7YLGE4DIf8VcvV6RsWK' # bcrypt
	printf '%s:%s\n' admin "$hash" shipper "$hash" >"$work/config/users"
	printf 'superuser:admin\nshipper:shipper\n' >"$work/config/users_roles"
	cat >"$work/config/roles.yml" <<YML
shipper:
  indices:
    - names: ["logs-*-*"]
      privileges: [auto_configure, create_doc]
YML
fi

# Elasticsearch refuses to run as root.
as=()
if [[ $(id -u) == 0 ]]; then
	owner=$(id -u nobody) || die "running as root and there is no user nobody to run the server as"
	chown -R "$owner" "$work"
	if command -v setpriv >/dev/null; then
		as=(setpriv --reuid "$owner" --regid "$owner" --clear-groups)
	else
		as=(runuser -u nobody --)
	fi
fi

started=$(date +%s.%N)
# exec keeps one process tree: the launcher passes a TERM on to the server.
(
	cd "$work"
	exec env -u ES_HOME -u CLASSPATH \
		HOME="$work" ES_JAVA_HOME="$JAVA_HOME" ES_PATH_CONF="$work/config" ES_TMPDIR="$work/tmp" \
		ES_JAVA_OPTS="-Xms$heap -Xmx$heap ${ES_JAVA_OPTS:-}" \
		${as[@]+"${as[@]}"} "$home/bin/elasticsearch"
) >"$work/out" 2>&1 </dev/null &
server=$!

# The server takes a free port itself and says which; guessing one before it
# binds would be a race.
url=
ready=
for _ in $(seq $((deadline * 5))); do
	kill -0 "$server" 2>/dev/null || { tail -n 40 "$work/out" >&2; die "the server ended before it was ready (its output is above)"; }
	if [[ -z $url ]]; then
		port=$(sed -n 's/.*AbstractHttpServerTransport.*publish_address {127\.0\.0\.1:\([0-9]*\)}.*/\1/p' "$work/out" | head -n 1)
		[[ -z $port ]] || url=http://127.0.0.1:$port
	elif curl -sf ${as_admin[@]+"${as_admin[@]}"} -o "$work/health" "$url/_cluster/health?wait_for_status=yellow&timeout=1s"; then
		ready=yes
		break
	fi
	sleep 0.2
done
[[ -n $ready ]] || { tail -n 40 "$work/out" >&2; die "not ready after $deadline s (its output is above; OUTRIGGER_ES_START_SECONDS gives it longer)"; }
say "$version ready at $url after $(echo "$(date +%s.%N) $started" | awk '{printf "%.1f", $1 - $2}') s"
say "modules: $(curl -sf ${as_admin[@]+"${as_admin[@]}"} "$url/_nodes/plugins?filter_path=nodes.*.modules.name" | tr -d '"{}[]' | sed 's/nodes:[^:]*:modules://; s/name://g')"

export OUTRIGGER_ES_URL=$url
if [[ $# -gt 0 ]]; then
	"$@"
else
	echo "$url"
	wait "$server"
fi
