#!/usr/bin/env bash
# Build the CUDA backend and run everything that needs a GPU: tests, sanitizer, bench. For a machine with one NVIDIA GPU, the
# CUDA toolkit, gcc, CMake and what .ci/deps.sh names.
#
#   bash .ci/gpu.sh [build] [test] [sanitize] [bench]     default: build test
#
# Logs go to $OUT (default build/gpu-logs). The bench writes its model to $MODEL (default /dev/shm/moed-30b.gguf) once.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-build/gpu-logs}
MODEL=${MODEL:-/dev/shm/moed-30b.gguf}
LAYERS=${LAYERS:-48}
bin=build/cuda/bin
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

tests() { ctest --test-dir build/cuda -L gpu --output-on-failure --timeout 300 >"$OUT/test.log" 2>&1; r=$?; tail -60 "$OUT/test.log"; return $r; }

sanitize() {
  local t r=0
  for t in "$bin"/test_cuda_*; do
    for tool in memcheck racecheck; do
      timeout 200 compute-sanitizer --tool "$tool" --error-exitcode 9 "$t" >"$OUT/$tool-$(basename "$t").log" 2>&1 || r=1
      echo "$tool $(basename "$t"): $(grep 'SUMMARY' "$OUT/$tool-$(basename "$t").log" | tail -1)"
    done
  done
  return $r
}

bench() {
  [ -s "$MODEL" ] || "$bin/moed-synth" --shape qwen3-30b-a3b --layers "$LAYERS" --type q4_k_m --vocab none -o "$MODEL" || return 1
  "$bin/moed-batched-bench" --model "$MODEL" --device cuda:0 --pp "${PP:-512}" --tg "${TG:-128}" --npl "${NPL:-1,8,32,64,128,256}" --repeat "${REPEAT:-1}" 2>&1 | tee "$OUT/bench.jsonl"
}

for s in "${stages[@]}"; do
  start=$SECONDS
  [ "$s" = test ] && f=tests || f=$s
  if "$f"; then echo "== $s ok, $((SECONDS - start)) s"; else echo "== $s FAILED, $((SECONDS - start)) s"; failed=1; [ "$s" = build ] && exit 1; fi
done
exit $failed
