# Sourced by the scripts that start a server: when the script ends, however it
# ends, the server whose process id is in $server is stopped and the folder $work
# removed. The script's exit status stays what it was.
# shellcheck shell=bash disable=SC2154
server=
stop() {
	local status=$?
	trap - EXIT INT TERM
	if [[ -n $server ]] && kill -0 "$server" 2>/dev/null; then
		kill -TERM "$server" 2>/dev/null || true
		for _ in $(seq 100); do
			kill -0 "$server" 2>/dev/null || break
			sleep 0.1
		done
		kill -KILL "$server" 2>/dev/null || true
	fi
	[[ -z $server ]] || wait "$server" 2>/dev/null || true
	rm -rf "$work"
	exit "$status"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
