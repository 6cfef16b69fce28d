#!/usr/bin/env bash
# Put the shared libraries that daemon, clients and tests need into .runtime/lib (ignored by git), for machines without a
# package registry. Run it on Debian 12; there, binaries built here run with LD_LIBRARY_PATH=$PWD/.runtime/lib.
#
#   bash .ci/runtime.sh
set -euo pipefail
cd "$(dirname "$0")/.."

# Ours, then what libzmq needs. The C and C++ runtimes are the machine's own.
packages=(libzmq5 libprotobuf-c1 libpcre2-8-0 libutf8proc2 libjansson4 libcmocka0
  libbsd0 libmd0 libsodium23 libpgm-5.3-0 libnorm1 libgssapi-krb5-2 libkrb5-3 libk5crypto3 libkrb5support0 libcom-err2
  libkeyutils1)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(cd "$work" && apt-get -q -o APT::Sandbox::User=root download "${packages[@]}" >log 2>&1) || {
  tail -5 "$work/log" >&2
  echo "runtime: apt-get download failed: is this Debian 12, and are its package lists there (apt-get update)?" >&2
  exit 1
}
for deb in "$work"/*.deb; do dpkg-deb -x "$deb" "$work/root"; done

rm -rf .runtime
mkdir -p .runtime/lib
# Each library once, under the name that the loader asks for.
find "$work/root" -name 'lib*.so.*' | while read -r f; do
  name=$(objdump -p "$f" | sed -n 's/^ *SONAME *//p')
  [ "$(basename "$f")" != "$name" ] || cp -L "$f" ".runtime/lib/$name"
done
echo "runtime: $(find .runtime/lib -type f | wc -l) libraries, $(du -sh .runtime | cut -f1) in .runtime/lib"
