#!/usr/bin/env bash
# From a bare Debian 12 and a clone to 32 questions answered at once: install what is missing, build, start
# a daemon on the bundled model, ask, show what it took, stop the daemon.
#
#   bash clients/demo.sh
#
# Nothing is left behind but build/release; the socket and the log live in a temporary directory.
set -euo pipefail
cd "$(dirname "$0")/.."

model=tests/data/tiny-moe-q4_k_m.gguf
questions=clients/questions.txt
bin=build/release/bin
daemon=
dir=

fail() {
  echo "demo: $*" >&2
  exit 1
}

cleanup() {
  if [ -n "$daemon" ] && kill -0 "$daemon" 2>/dev/null; then
    kill -KILL "$daemon" 2>/dev/null || true
    wait "$daemon" 2>/dev/null || true
  fi
  [ -z "$dir" ] || rm -rf "$dir"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say() { printf '\n== %s\n' "$*"; }

build() {
  mkdir -p build
  cmake --preset release >build/demo-configure.log 2>&1 || { cat build/demo-configure.log >&2; fail "cmake failed"; }
  if [ -t 1 ]; then # ninja shows how far it is, on one line
    cmake --build --preset release --target moed moed-cli moed-load
  else
    cmake --build --preset release --target moed moed-cli moed-load >build/demo-build.log 2>&1 ||
      { tail -40 build/demo-build.log >&2; fail "the build failed"; }
  fi
}

start_daemon() {
  dir=$(mktemp -d "${TMPDIR:-/tmp}/moed-demo-XXXXXX")
  export MOED_ENDPOINT="ipc://$dir/moed.sock"
  # A small KV pool: 512 blocks of 16 tokens hold all 32 conversations with room to spare.
  "$bin/moed" --model "$model" --kv-blocks 512 >"$dir/moed.log" 2>&1 &
  daemon=$!
  for _ in $(seq 300); do
    if "$bin/moed-cli" health --timeout 200 >"$dir/health" 2>&1; then return; fi
    kill -0 "$daemon" 2>/dev/null || { cat "$dir/moed.log" >&2; fail "the daemon did not start"; }
    sleep 0.2
  done
  cat "$dir/moed.log" >&2
  fail "the daemon is not ready after a minute"
}

stop_daemon() {
  local code=0
  kill -TERM "$daemon"
  wait "$daemon" || code=$?
  daemon=
  [ "$code" -eq 0 ] || { tail -20 "$dir/moed.log" >&2; fail "the daemon ended with status $code"; }
}

bash .ci/deps.sh build

say "building (release)"
build
echo "built $bin/moed, moed-cli, moed-load"

say "starting a daemon on $model"
start_daemon
"$bin/moed-cli" info | grep -E '^(model|architecture|quantization|backend|experts) '

n=$(grep -c . "$questions")
say "asking $n questions at once"
"$bin/moed-load" --prompts "$questions" --requests "$n" --concurrency "$n" --max-tokens 96 --show-answers \
  --verify 4 || fail "not every question was answered"

say "stopping the daemon"
stop_daemon
echo "SIGTERM: the daemon finished its work and exited with status 0"
