#!/usr/bin/env bash
# Finds nginx and HAProxy, or unpacks Debian's packages of them into
# .cache/bench/debian, once, without root. Prints one line each:
#
#   nginx <path of the program> <path of the stream module, or ->
#   haproxy <path of the program>
#   libraries <folder for LD_LIBRARY_PATH, or ->
#   missing <nginx|haproxy> <reason>
#
# Needs for unpacking: apt-get with a package list, dpkg.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
home=$root/.cache/bench/debian
libs=-

say() { echo "tools.sh: $*" >&2; }

# fetch unpacks packages beside each other; what fails is said in $why.
fetch() {
	command -v apt-get >/dev/null && command -v dpkg >/dev/null || { why="not in PATH, and there is no apt-get to fetch it with"; return 1; }
	mkdir -p "$home/packages" || { why="cannot write $home"; return 1; }
	say "fetching $* (once)"
	# apt's sandbox user cannot write here; where that is all, it warns and goes on.
	(cd "$home/packages" && apt-get download -q "$@") >"$home/fetch.log" 2>&1 || { why="apt-get download failed: $(grep -m1 '^E:' "$home/fetch.log")"; return 1; }
	local one
	for one in "$@"; do
		dpkg -x "$home/packages/$one"_*.deb "$home/root" || { why="$one cannot be unpacked"; return 1; }
	done
}

triplet=$(uname -m)-linux-gnu
has() { LD_LIBRARY_PATH=$home/root/usr/lib/$triplet "$1" -v >/dev/null 2>&1; }

nginx() {
	if p=$(type -P nginx); then
		m=-
		for f in /usr/lib/nginx/modules /usr/lib64/nginx/modules; do [[ -f $f/ngx_stream_module.so ]] && m=$f/ngx_stream_module.so; done
		echo "nginx $p $m"
		return
	fi
	p=$home/root/usr/sbin/nginx
	has "$p" || fetch nginx libnginx-mod-stream || { echo "missing nginx $why"; return; }
	has "$p" || { echo "missing nginx the unpacked one does not run: $(LD_LIBRARY_PATH=$home/root/usr/lib/$triplet "$p" -v 2>&1 | head -n 1)"; return; }
	echo "nginx $p $home/root/usr/lib/nginx/modules/ngx_stream_module.so"
}

haproxy() {
	if p=$(type -P haproxy); then
		echo "haproxy $p"
		return
	fi
	p=$home/root/usr/sbin/haproxy
	has "$p" || fetch haproxy liblua5.3-0 libopentracing-c-wrapper0 libopentracing1 || { echo "missing haproxy $why"; return; }
	has "$p" || { echo "missing haproxy the unpacked one does not run: $(LD_LIBRARY_PATH=$home/root/usr/lib/$triplet "$p" -v 2>&1 | head -n 1)"; return; }
	echo "haproxy $p"
}

nginx
haproxy
[[ -d $home/root/usr/lib/$triplet ]] && libs=$home/root/usr/lib/$triplet
echo "libraries $libs"
