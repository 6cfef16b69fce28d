#!/usr/bin/env bash
# Install the Debian packages that are missing; say nothing when none is.
#
#   bash .ci/deps.sh          what building and testing need
#   bash .ci/deps.sh build    what building needs
set -euo pipefail

packages=(build-essential cmake ninja-build pkg-config libzmq3-dev libprotobuf-c-dev protobuf-c-compiler
  libpcre2-dev libutf8proc-dev libjansson-dev libcmocka-dev python3)
case "${1:-all}" in
build) ;;
all) packages+=(clang libclang-rt-14-dev) ;; # the fuzzers
*)
  echo "usage: .ci/deps.sh [build]" >&2
  exit 2
  ;;
esac

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
  echo "deps: no Debian here; install the equivalents of: ${packages[*]}" >&2
  exit 1
fi

missing=()
for p in "${packages[@]}"; do
  [ "$(dpkg-query -W -f='${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing+=("$p")
done
[ ${#missing[@]} -gt 0 ] || exit 0

give_up() {
  echo "deps: $1" >&2
  echo "deps: install these by hand: apt-get install --no-install-recommends ${missing[*]}" >&2
  exit 1
}

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || give_up "packages are missing, this is not root, and there is no sudo"
  as_root=(sudo)
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o Dpkg::Use-Pty=0 "$@" >"$log" 2>&1; }
install() { apt install --no-install-recommends "${missing[@]}"; }

echo "deps: installing ${missing[*]}"
# Old package lists name versions that the archive no longer has; new machines have no lists at all.
if ! install; then
  echo "deps: updating the package lists"
  apt update || { tail -5 "$log" >&2; give_up "apt-get update failed: is there a network?"; }
  install || { tail -15 "$log" >&2; give_up "apt-get install failed: no network, or sources other than Debian 12's?"; }
fi
