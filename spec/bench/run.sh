#!/usr/bin/env bash
# Benchmarks: bash spec/bench/run.sh [overhead nanogpt memory makemoe ...]     (default: overhead memory nanogpt)
# PyTorch does the same work in the same run, in turns, where MOE_BENCH_PYTHON (or python3) has it; two threads each.
# Any spec/bench/NAME.sh is a benchmark too. Figures and how they were obtained: spec/bench/README.md.
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/setup.sh
setup_lua || { setup_say "no Lua 5.4 found"; exit 1; }
build=${MOE_BUILD:-build}
[ -f "$build/moe/core.so" ] || { setup_tools; setup_build "$build"; }
case $build in /*) ;; *) build=./$build ;; esac
export LUA_PATH="./lua/?.lua;./lua/?/init.lua;./?.lua" LUA_CPATH="$build/?.so"
export MOE_THREADS=${MOE_THREADS:-2} OMP_NUM_THREADS=${MOE_THREADS:-2} OPENBLAS_NUM_THREADS=${MOE_THREADS:-2}
export PYTHONPATH=spec/bench${PYTHONPATH:+:$PYTHONPATH}
data=${MOE_DATA:-../shared/data}
python=${MOE_BENCH_PYTHON:-python3}
"$python" -c 'import torch' 2>/dev/null || python=''
[ -n "$python" ] || setup_say "no PyTorch in ${MOE_BENCH_PYTHON:-python3}: our side alone (set MOE_BENCH_PYTHON)"

work=$(mktemp -d)
trap 'rm -rf "$work"; kill $(jobs -p) 2>/dev/null || true' EXIT

ratio() { awk -v a="$1" -v b="$2" 'BEGIN { if (b > 0) printf "%.2f", a / b; else print "-" }'; }

# in_turns BLOCKS N COMMAND COMMAND: lets both work N steps at a time, in turns; afterwards mean[i] is the mean ms a
# step of the best block, least[i] the best single step, answer[i] what it said at the end.
in_turns() {
  local blocks=$1 n=$2 i b m l fd to=() from=()
  shift 2
  local count=$#
  mean=() least=() answer=()
  for ((i = 0; i < count; i++)); do
    rm -f "$work/in$i" "$work/out$i"
    mkfifo "$work/in$i" "$work/out$i"
    bash -c "$1" <"$work/in$i" >"$work/out$i" &
    exec {fd}>"$work/in$i"
    to[i]=$fd
    exec {fd}<"$work/out$i"
    from[i]=$fd
    mean[i]=1e30 least[i]=1e30
    shift
  done
  for ((b = 0; b < blocks; b++)); do
    for ((i = 0; i < count; i++)); do
      echo "$n" >&"${to[i]}"
      read -r m l <&"${from[i]}" || { setup_say "a side of the benchmark ended early"; exit 1; }
      mean[i]=$(awk -v a="${mean[i]}" -v b="$m" 'BEGIN { print (b < a) ? b : a }')
      least[i]=$(awk -v a="${least[i]}" -v b="$l" 'BEGIN { print (b < a) ? b : a }')
    done
  done
  for ((i = 0; i < count; i++)); do
    echo end >&"${to[i]}"
    read -r answer[i] <&"${from[i]}"
    fd=${to[i]}
    exec {fd}>&-
    fd=${from[i]}
    exec {fd}<&-
  done
  wait
}

bench_overhead() {
  local commands=("exec $LUA spec/bench/overhead.lua") least_ms=1e30 t i
  [ -n "$python" ] && commands+=("exec $python spec/bench/overhead_torch.py")
  in_turns 20 5 "${commands[@]}"
  set -- ${answer[0]} ${answer[1]:-}
  echo "overhead, add of two 8-element tensors, us a call (least of 100 rounds of 20000)"
  printf '  %-12s ours %.3f   torch %s   ratio %s\n' plain "$1" "${3:--}" "$(ratio "${3:-0}" "$1")"
  printf '  %-12s ours %.3f   torch %s   ratio %s\n' recorded "$2" "${4:--}" "$(ratio "${4:-0}" "$2")"
  for i in 1 2 3 4 5 6 7 8 9 10; do
    t=$("$LUA" -e 'local c = os.clock() local m = require "moe" print(m and (os.clock() - c) * 1e3)')
    least_ms=$(awk -v a="$least_ms" -v b="$t" 'BEGIN { print (b < a) ? b : a }')
  done
  printf '  require "moe": %.1f ms of processor time (least of 10 processes)\n' "$least_ms"
}

bench_nanogpt() {
  local commands=("exec $LUA spec/bench/nanogpt.lua $data/tinyshakespeare.txt")
  [ -n "$python" ] && commands+=("exec $python spec/bench/nanogpt_torch.py $data/tinyshakespeare.txt")
  in_turns 20 100 "${commands[@]}"
  echo "nanoGPT's CPU setting, 2000 steps in blocks of 100, in turns"
  printf '  ours  %.2f ms a step (best block), held-out loss %s\n' "${mean[0]}" "${answer[0]}"
  if [ -n "$python" ]; then
    printf '  torch %.2f ms a step (best block), held-out loss %s\n' "${mean[1]}" "${answer[1]}"
    printf '  ours takes %s of the time of torch\n' "$(ratio "${mean[0]}" "${mean[1]}")"
  fi
}

bench_memory() {
  local ours torch
  echo "memory"
  set -- $("$LUA" spec/bench/memory.lua steps "${MOE_BENCH_STEPS:-3000}")
  printf '  resident size over %s steps: second tenth %s MB, last tenth %s MB, ratio %s\n' "${MOE_BENCH_STEPS:-3000}" "$1" "$2" "$3"
  for sizes in "2048 512 1024 16 2" "2048 512 512 64 8"; do
    ours=$("$LUA" spec/bench/memory.lua layer $sizes)
    torch=-
    [ -n "$python" ] && torch=$("$python" spec/bench/memory_torch.py $sizes)
    printf '  peak of an MoE layer (%s) above weights and input: ours %s MB (resident, counted), torch %s MB\n' "$sizes" "$ours" "$torch"
  done
}

bench_moe_layer() {
  local sizes commands
  for sizes in "2048 512 1024 16 2" "2048 512 512 64 8"; do
    commands=("exec $LUA spec/bench/moe_layer.lua $sizes")
    [ -n "$python" ] && commands+=("exec $python spec/bench/moe_layer_torch.py $sizes")
    in_turns 6 4 "${commands[@]}"
    set -- $sizes ${answer[0]} ${answer[1]:-- - -}
    awk -v t="$1" -v d="$2" -v h="$3" -v e="$4" -v k="$5" -v both="$6" -v fwd="$7" -v blas="$8" -v tboth="$9" -v tfwd="${10}" -v tblas="${11}" '
      BEGIN {
        work = 6 * t * k * d * h / 1e6
        printf "MoE layer (tokens %d, d %d, hidden %d, experts %d, k %d), least of 24, two threads\n", t, d, h, e, k
        printf "  forward + backward  ours %.1f ms, %.0f GFLOP/s, %.1f %% of sgemm at 1024 (%.0f GFLOP/s)\n", both, 3 * work / both, 300 * work / both / blas, blas
        printf "  forward             ours %.1f ms, %.1f %% of sgemm\n", fwd, 100 * work / fwd / blas
        if (tboth + 0 > 0) {
          printf "  torch               forward + backward %.1f ms, forward %.1f ms (its product at 1024: %.0f GFLOP/s)\n", tboth, tfwd, tblas
          printf "  torch / ours        forward + backward %.2f, forward %.2f\n", tboth / both, tfwd / fwd
        }
      }'
  done
}

bench_attention() {
  local sizes="8 256 384 6" threads commands
  for threads in 1 2; do
    commands=("MOE_THREADS=$threads exec $LUA spec/bench/attention.lua $sizes")
    [ -n "$python" ] && commands+=("MOE_THREADS=$threads OMP_NUM_THREADS=$threads exec $python spec/bench/attention_torch.py $sizes")
    in_turns 12 4 "${commands[@]}"
    set -- $threads $sizes ${answer[0]} ${answer[1]:-- - - - -}
    awk -v n="$1" -v b="$2" -v t="$3" -v w="$4" -v h="$5" -v both="$6" -v fwd="$7" -v cboth="$8" -v cfwd="$9" -v blas="${10}" \
      -v tboth="${11}" -v tfwd="${12}" -v tcboth="${13}" -v tcfwd="${14}" -v tblas="${15}" '
      BEGIN {
        work = 7 * b * t * (t + 1) * w / 1e6 # seven products of the triangle with its diagonal, a multiplication and an addition each
        printf "causal attention (batch %d, time %d, width %d, heads %d), least of 192, threads %d\n", b, t, w, h, n
        printf "  forward + backward  ours %.2f ms, processor %.2f ms, %.1f %% of sgemm at 1024 (%.0f GFLOP/s)\n", both, cboth, 100 * work / both / blas, blas
        printf "  forward             ours %.2f ms, processor %.2f ms\n", fwd, cfwd
        if (tboth + 0 > 0) {
          printf "  torch               forward + backward %.2f ms, processor %.2f ms; forward %.2f, %.2f ms (its product: %.0f GFLOP/s)\n", tboth, tcboth, tfwd, tcfwd, tblas
          printf "  torch / ours        forward + backward %.2f, processor %.2f; forward %.2f, %.2f\n", tboth / both, tcboth / cboth, tfwd / fwd, tcfwd / cfwd
        }
      }'
  done
  echo "its peak memory by length, forward + backward, one head of 64, window 1024, above the inputs"
  "$LUA" spec/bench/attention.lua memory
}

bench_makemoe() {
  echo "makeMoE's setting, 5000 steps"
  "$LUA" spec/bench/makemoe.lua "$data/tinyshakespeare.txt"
}

[ $# -gt 0 ] || set -- overhead memory nanogpt
for name in "$@"; do
  if declare -F "bench_$name" >/dev/null; then
    (set +e; "bench_$name")
  elif [ -f "spec/bench/$name.sh" ]; then
    bash "spec/bench/$name.sh"
  else
    setup_say "no benchmark is called '$name'"
    exit 1
  fi
done
