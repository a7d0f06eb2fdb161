#!/usr/bin/env bash
# Builds what a real Kubernetes consists of, from Go modules, into .cache/testbed:
#
#   deploy/testbed/build.sh api       etcd and kube-apiserver: what `make test` uses
#   deploy/testbed/build.sh cluster   everything a node needs too: what `make e2e` uses
#
# The first build of api takes some 5 minutes on two cores, of cluster some 20;
# afterwards it is a second, for what has been built is kept under a name made of
# the module files and of this script. Prints the folder of the binaries.
#
# Needs Go; cluster also gcc and Debian's package archive (apt-get download, no
# root): libseccomp, which runc links, and nft, which kube-proxy runs.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
cache=$root/.cache/testbed
what=${1:-api}

say() { echo "testbed: $*" >&2; }
die() { say "$*"; exit 1; }

# key FOLDER: names the binaries of a module by all that they are made of.
key() { cat "$here/$1/go.mod" "$here/$1/go.sum" "$here/build.sh" | sha256sum | cut -c1-12; }

# build MODULE NAME PACKAGE [ENV=VALUE...] -- FLAGS...: one binary, unless it is there.
build() {
	local module=$1 name=$2 package=$3 started=$SECONDS
	shift 3
	local env=(CGO_ENABLED=0)
	while [[ $1 != -- ]]; do env+=("$1"); shift; done
	shift
	local out=$cache/$module-$(key "$module")
	mkdir -p "$out" "$cache/bin"
	if [[ ! -x $out/$name ]]; then
		say "building $name (once)"
		(cd "$here/$module" && env "${env[@]}" GOFLAGS=-buildvcs=false go build -trimpath -o "$out/.$name" "$@" "$package")
		mv "$out/.$name" "$out/$name"
		say "$name: built in $((SECONDS - started)) s"
	fi
	ln -sfn "../${out##*/}/$name" "$cache/bin/$name" # relative: a checkout may be moved
}

version=$(cd "$here/kubernetes" && go list -m -f '{{.Version}}' k8s.io/kubernetes)
minor=${version#v1.}
minor=${minor%%.*}
stamp=k8s.io/component-base/version
# Without these the servers say v0.0.0-master, and kubelets are refused for their skew.
kubernetes=(-ldflags "-s -w -X $stamp.gitVersion=$version -X $stamp.gitMajor=1 -X $stamp.gitMinor=$minor -X $stamp.gitTreeState=clean -X $stamp.gitCommit=unknown")

build kubernetes etcd go.etcd.io/etcd/server/v3 -- -ldflags "-s -w"
build kubernetes kube-apiserver k8s.io/kubernetes/cmd/kube-apiserver -- "${kubernetes[@]}"

if [[ $what == cluster ]]; then
	for name in kube-controller-manager kube-scheduler kubelet kube-proxy; do
		build kubernetes $name k8s.io/kubernetes/cmd/$name -- "${kubernetes[@]}"
	done

	# Debian's packages are unpacked beside, not installed: nothing changes on this machine.
	debian=$cache/debian
	if [[ ! -e $debian/done ]]; then
		command -v apt-get >/dev/null || die "no apt-get to fetch libseccomp-dev and nftables from"
		rm -rf "$debian" && mkdir -p "$debian/archives"
		say "fetching libseccomp and nftables"
		(cd "$debian/archives" && apt-get download -qq libseccomp-dev libseccomp2 nftables libnftables1 libedit2 libbsd0 libmd0 libjansson4 libgmp10 libnftnl11 libmnl0 libxtables12 libtinfo6 iptables libip4tc2 libip6tc2 libnetfilter-conntrack3 libnfnetlink0)
		for archive in "$debian"/archives/*.deb; do dpkg -x "$archive" "$debian"; done
		touch "$debian/done"
	fi
	lib=$debian/usr/lib/$(gcc -print-multiarch)

	tags=no_btrfs,no_devmapper,no_zfs,no_aufs,urfave_cli_no_docs,osusergo,netgo,static_build
	build node containerd github.com/containerd/containerd/v2/cmd/containerd -- -tags $tags -ldflags "-s -w"
	build node ctr github.com/containerd/containerd/v2/cmd/ctr -- -tags $tags -ldflags "-s -w"
	build node containerd-shim-runc-v2 github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2 -- -tags $tags,no_grpc -ldflags "-s -w"
	# The kubelet asks for the default seccomp profile on each sandbox, so runc without it runs nothing.
	build node runc github.com/opencontainers/runc CGO_ENABLED=1 \
		PKG_CONFIG_PATH="$lib/pkgconfig" CGO_CFLAGS="-I$debian/usr/include" CGO_LDFLAGS="-L$lib -l:libseccomp.a" \
		-- -tags seccomp -ldflags "-s -w -X main.version=1.5.2"
	for plugin in ipam/host-local main/bridge main/loopback; do
		build node "${plugin#*/}" github.com/containernetworking/plugins/plugins/$plugin -- -ldflags "-s -w"
	done
	build dns coredns github.com/coredns/coredns -- -ldflags "-s -w"
fi
echo "$cache/bin"
