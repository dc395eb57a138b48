#!/usr/bin/env bash
# Installs what is missing, builds, and runs every spec. Options (all others go to busted):
#   --device cuda   the specs marked #cuda, on that device
#   --sanitize      a build with the address and undefined-behaviour sanitizers, in build-asan/
#   --build DIR     use another build folder
# Examples: bash spec/run.sh            bash spec/run.sh spec/op --filter=matmul
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup.sh

build=build sanitize=0 device='' rest=()
while [ $# -gt 0 ]; do
  case $1 in
    --device) device=${2:?--device wants a name}; shift ;;
    --device=*) device=${1#*=} ;;
    --build) build=${2:?--build wants a folder}; shift ;;
    --build=*) build=${1#*=} ;;
    --sanitize) sanitize=1 ;;
    -h | --help) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) rest+=("$1") ;;
  esac
  shift
done

setup_tools --tests
options=(-DMOE_BUILD_CHECKS=ON -DMOE_BUILD_EMBED=ON)
[ -n "${CI:-}" ] && options+=(-DMOE_WERROR=ON)
if [ $sanitize = 1 ]; then
  [ "$build" = build ] && build=build-asan
  options+=(-DMOE_SANITIZE=ON)
fi
setup_build "$build" ${options[@]+"${options[@]}"}

if [ $sanitize = 1 ]; then
  # The interpreter is not built with the sanitizer, so its run time has to come first. Leaks are counted by the
  # specs themselves (moe.memory): at exit the interpreter has unloaded the module whose names a report would need.
  export LD_PRELOAD=$(cc -print-file-name=libasan.so)
  export ASAN_OPTIONS=${ASAN_OPTIONS:-detect_leaks=0:detect_odr_violation=0:allocator_may_return_null=1}
  export UBSAN_OPTIONS=${UBSAN_OPTIONS:-print_stacktrace=1:halt_on_error=1}
  export MOE_TEST_SANITIZE=1
fi
# The driver first decides which busted configuration runs: .busted's `cuda` takes the marked specs alone.
if [ -n "$device" ]; then
  export MOE_TEST_DEVICE=$device
  rest=("--run=${device%%:*}" ${rest[@]+"${rest[@]}"})
fi
case $build in /*) lib=$build ;; *) lib=./$build ;; esac
exec "$LUA" spec/busted.lua --lpath='./lua/?.lua;./lua/?/init.lua' --cpath="$lib/?.so" ${rest[@]+"${rest[@]}"}
