#!/usr/bin/env bash
# Build the CUDA backend and run everything that needs a GPU: tests, sanitizer, bench, the daemon under load. For a machine with
# one NVIDIA GPU, the CUDA toolkit, gcc, CMake and what .ci/deps.sh names; or with binaries built elsewhere in $BIN and their
# libraries in .runtime/lib (.ci/runtime.sh).
#
#   bash .ci/gpu.sh [build] [test] [test2] [sanitize] [bench] [serve]     default: build test; test2: what needs two GPUs
#
# Logs and results go to $OUT (default build/gpu-logs). bench and serve write their model to $MODEL (default
# /dev/shm/moed-30b.gguf) once. serve passes $FLAGS to moed and loads it at each of $CONCURRENCY.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-build/gpu-logs}
MODEL=${MODEL:-/dev/shm/moed-30b.gguf}
LAYERS=${LAYERS:-48}
bin=${BIN:-build/cuda/bin}
export LD_LIBRARY_PATH=$PWD/.runtime/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
mkdir -p "$OUT" build
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(build test)
failed=0

build() {
  generator=()
  command -v ninja >/dev/null || generator=(-G "Unix Makefiles")
  cmake --preset cuda "${generator[@]}" -DMOED_SERVER="${SERVER:-OFF}" -DMOED_CUDA_ARCHS="${ARCH:-90a-real}" >"$OUT/configure.log" 2>&1 || { tail -20 "$OUT/configure.log"; return 1; }
  cmake --build --preset cuda -j "$(nproc)" >"$OUT/build.log" 2>&1 || { grep -E -A5 'error|Error' "$OUT/build.log" | head -60; return 1; }
}

tests() { ctest --test-dir build/cuda -L '^gpu$' --output-on-failure --timeout 300 >"$OUT/test.log" 2>&1; r=$?; tail -60 "$OUT/test.log"; return $r; }

test2() { ctest --test-dir build/cuda -L '^gpu2$' --output-on-failure --timeout 600 >"$OUT/test2.log" 2>&1; r=$?; tail -60 "$OUT/test2.log"; return $r; }

# racecheck takes a bulk copy by address for a write of the thread that asked for it, and does not see that others wait for its
# arrival: it reports every read of what k_gemm_dense's panels came by. All other kernels are looked at.
sanitize() {
  local t tool except r=0
  for t in "$bin"/test_cuda_*; do
    for tool in memcheck racecheck; do
      except=()
      [ "$tool" = memcheck ] || except=(--kernel-name-exclude kns=k_gemm_dense)
      timeout 900 compute-sanitizer --tool "$tool" "${except[@]}" --error-exitcode 9 "$t" >"$OUT/$tool-$(basename "$t").log" 2>&1 || r=1
      echo "$tool $(basename "$t"): $(grep 'SUMMARY' "$OUT/$tool-$(basename "$t").log" | tail -1)"
    done
  done
  return $r
}

model() { [ -s "$MODEL" ] || "$bin/moed-synth" --shape qwen3-30b-a3b --layers "$LAYERS" --type q4_k_m --vocab none -o "$MODEL"; }

bench() {
  model || return 1
  "$bin/moed-batched-bench" --model "$MODEL" --device cuda:0 --pp "${PP:-512}" --tg "${TG:-128}" --npl "${NPL:-1,8,32,64,128,256}" --repeat "${REPEAT:-1}" 2>&1 | tee "$OUT/bench.jsonl"
}

# The daemon's log up to event=ready; fails when it ends before or is not ready in time.
wait_ready() { # pid, log, seconds
  for _ in $(seq $(($3 * 5))); do
    grep -q 'event=ready' "$2" && return 0
    kill -0 "$1" 2>/dev/null || return 1
    sleep 0.2
  done
  return 1
}

serve() {
  model || return 1
  local c r=0 pid log=$OUT/moed.log sock
  sock=ipc://$(mktemp -u /tmp/moed-XXXXXX.sock)
  # shellcheck disable=SC2086
  "$bin/moed" --model "$MODEL" --device cuda:0 --listen "$sock" ${FLAGS:-} >"$log" 2>&1 &
  pid=$!
  wait_ready $pid "$log" "${READY_S:-120}" || { tail -5 "$log"; kill $pid 2>/dev/null; return 1; }
  for c in ${CONCURRENCY:-8 64 256}; do
    "$bin/moed-load" --endpoint "$sock" --concurrency "$c" --requests $((c * ${WAVES:-4})) --prompt-tokens "${PP:-512}" \
      --max-tokens "${TG:-128}" --ignore-eos --verify "${VERIFY:-8}" --label "c$c ${FLAGS:-}" --json "$OUT/load-$c.json" 2>&1 || r=1
  done
  kill -TERM $pid
  wait $pid || { echo "moed ended with status $?"; tail -5 "$log"; r=1; }
  return $r
}

for s in "${stages[@]}"; do
  start=$SECONDS
  [ "$s" = test ] && f=tests || f=$s
  if "$f"; then echo "== $s ok, $((SECONDS - start)) s"; else echo "== $s FAILED, $((SECONDS - start)) s"; failed=1; [ "$s" = build ] && exit 1; fi
done
exit $failed
