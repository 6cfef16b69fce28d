#!/usr/bin/env bash
# Install what is missing, build, run every test. From a bare Debian 12 and a clone, nothing else is needed.
#
#   bash tests/run.sh            everything
#   bash tests/run.sh asan       one stage: lint, asan, tsan, release, fuzz or cuda
#
# Stages: lint; asan and ubsan builds with every test; tsan with the tests that use threads; the release build
# with every test again (it is what users run); a short run of each fuzzer; and, where nvcc is found, a
# compile of cuda/ with its tests that need no GPU. A stage that cannot run here says so in the summary.
set -euo pipefail
cd "$(dirname "$0")/.."
jobs=$(nproc)
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(lint asan tsan release fuzz cuda)

bash .ci/deps.sh

say() { printf '\n== %s\n' "$*"; }
summary=()

build() { # preset [target…]
  cmake --preset "$1" >"build/$1.configure.log" 2>&1 || { cat "build/$1.configure.log"; return 1; }
  local targets=()
  [ $# -lt 2 ] || targets=(--target "${@:2}")
  cmake --build --preset "$1" -j "$jobs" "${targets[@]}" >"build/$1.build.log" 2>&1 || { tail -60 "build/$1.build.log"; return 1; }
}

run_ctest() { # preset [ctest arguments…]
  local preset=$1
  shift
  ctest --test-dir "build/$preset" --output-on-failure --no-tests=error --timeout 600 -j "$jobs" -LE gpu "$@"
}

stage_lint() {
  python3 tests/lint.py --self-test
  python3 tests/lint.py
}

stage_asan() {
  build asan
  # Not detect_stack_use_after_return: GCC 12 then misaligns 64-byte locals (GCC bug 110027), and AVX-512 code faults.
  UBSAN_OPTIONS=print_stacktrace=1 run_ctest asan
}

# The tests in which threads meet: the daemon's, the CPU backend's, the ranks' of a group, the client's and ZeroMQ's.
stage_tsan() {
  build tsan
  TSAN_OPTIONS="halt_on_error=1:suppressions=$PWD/tests/tsan.supp" run_ctest tsan -R 'pool|daemon|client_lib|group'
}

stage_release() {
  build release
  run_ctest release
}

# Seconds per target; longer runs: cmake --preset fuzz, then build/fuzz/bin/fuzz_<name>.
stage_fuzz() {
  build fuzz fuzz_gguf fuzz_text fuzz_wire
  local ran=0 f
  for f in build/fuzz/bin/fuzz_*; do
    [ -x "$f" ] || continue
    say "$(basename "$f")"
    "$f" -max_total_time="${FUZZ_SECONDS:-10}" -rss_limit_mb=2048 -print_final_stats=0 2>&1 | tail -3
    ran=$((ran + 1))
  done
  [ "$ran" -gt 0 ]
}

stage_cuda() {
  if ! command -v nvcc >/dev/null; then
    summary+=("cuda      not built: no nvcc here (the CUDA toolkit is optional)")
    return 0
  fi
  build cuda moed test_panel_layout test_cuda_{ops,attention,sample,model,open}
  run_ctest cuda -R 'cuda|panel'
}

mkdir -p build
for s in "${stages[@]}"; do
  say "$s"
  start=$SECONDS
  "stage_$s"
  summary+=("$(printf '%-9s ok, %d s' "$s" $((SECONDS - start)))")
done
say "summary"
printf '%s\n' "${summary[@]}"
