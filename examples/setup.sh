#!/usr/bin/env bash
# Installs what is missing and builds build/ (Release). `examples/quickstart.sh` and `spec/run.sh` source this file;
# it also runs alone: bash examples/setup.sh [--tests]
#
# setup_lua:   sets LUA to a Lua 5.4 interpreter
# setup_tools [--tests]: compiler, CMake, Lua, OpenBLAS, and busted with --tests
# setup_build DIR [cmake options]: configures and builds the module into DIR/moe/core.so

setup_say() { printf '%s\n' "$*" >&2; }

setup_lua() {
  local name
  for name in "${LUA:-}" lua5.4 lua54 lua-5.4 lua; do
    [ -n "$name" ] && command -v "$name" >/dev/null 2>&1 || continue
    if "$name" -e 'os.exit(_VERSION == "Lua 5.4")' 2>/dev/null; then
      LUA=$name
      return 0
    fi
  done
  return 1
}

setup_include_lua() {
  # The header that matches the interpreter: Debian keeps it in a folder of its own, others in the common one.
  local dir
  for dir in "${LUA_INCDIR:-}" /usr/include/lua5.4 /usr/local/include/lua5.4 /usr/include /usr/local/include \
      /opt/homebrew/include/lua5.4 /opt/homebrew/include/lua /usr/include/lua-5.4 /usr/include/lua54; do
    [ -n "$dir" ] && [ -f "$dir/lua.h" ] && grep -q 'LUA_VERSION_NUM[[:space:]]*504' "$dir/lua.h" && return 0
  done
  return 1
}

setup_include_blas() {
  local dir
  echo '#include <cblas.h>' | cc -E -x c - >/dev/null 2>&1 && return 0
  for dir in "${OPENBLAS_INCDIR:-}" /usr/include/openblas /opt/homebrew/opt/openblas/include /usr/local/opt/openblas/include; do
    [ -n "$dir" ] && [ -f "$dir/cblas.h" ] && return 0
  done
  return 1
}

# Prints what is missing, one word a line.
setup_missing() {
  command -v cmake >/dev/null 2>&1 || echo cmake
  command -v make >/dev/null 2>&1 || command -v ninja >/dev/null 2>&1 || echo make
  if ! echo 'int main(void) { return 0; }' | cc -x c -o /dev/null - >/dev/null 2>&1; then echo cc; fi
  setup_lua || echo lua
  setup_include_lua || echo lua-headers
  setup_include_blas || echo openblas
  if [ "${1:-}" = --tests ]; then
    { setup_lua && "$LUA" -e 'require "busted.runner"' >/dev/null 2>&1; } || echo busted
  fi
}

setup_packages() {
  local word
  for word in $1; do
    case $word in
      cmake | make) echo "$word" ;;
      cc) echo "gcc libc6-dev" ;;
      lua) echo lua5.4 ;;
      lua-headers) echo liblua5.4-dev ;;
      openblas) echo libopenblas-dev ;;
      busted) echo lua-busted ;;
    esac
  done
}

setup_tools() {
  local missing packages root=()
  missing=$(setup_missing "$@")
  [ -z "$missing" ] && return 0
  if ! command -v apt-get >/dev/null 2>&1; then
    setup_say "Missing: ${missing//$'\n'/, }. Please install a C compiler, CMake 3.16 or later, make, Lua 5.4 with its headers,"
    setup_say "OpenBLAS with its headers${1:+, and busted for Lua 5.4}. For example:"
    setup_say "  Fedora   dnf install cmake gcc make lua lua-devel openblas-devel"
    setup_say "  Arch     pacman -S cmake gcc make lua54 openblas"
    setup_say "  macOS    brew install cmake lua@5.4 openblas"
    setup_say "  busted   luarocks --lua-version 5.4 install busted"
    return 1
  fi
  packages=$(setup_packages "$missing")
  if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null 2>&1; then
      setup_say "Missing: ${missing//$'\n'/, }. Please run as root: apt-get install" $packages
      return 1
    fi
    root=(sudo)
  fi
  setup_say "Installing:" $packages
  "${root[@]}" apt-get update -qq >&2 || setup_say "apt-get update failed; trying with the lists there are"
  # shellcheck disable=SC2086
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >&2 || {
    setup_say "apt-get could not install:" $packages
    return 1
  }
  missing=$(setup_missing "$@")
  if [ "$missing" = busted ] && command -v luarocks >/dev/null 2>&1; then
    # The distribution's busted may be built for other Lua versions only.
    luarocks --lua-version 5.4 --local install busted >&2 && eval "$(luarocks --lua-version 5.4 --local path)"
    missing=$(setup_missing "$@")
  fi
  [ -z "$missing" ] || { setup_say "Still missing after the installation: ${missing//$'\n'/, }"; return 1; }
}

setup_build() {
  local dir=$1
  shift
  setup_lua || return 1
  local log=$dir/setup.log
  mkdir -p "$dir"
  [ -f "$dir/moe/core.so" ] || setup_say "Building $dir (about two minutes on two cores) ..."
  if ! cmake -S . -B "$dir" -DCMAKE_BUILD_TYPE=Release "$@" >"$log" 2>&1 ||
    ! cmake --build "$dir" --parallel "$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)" >>"$log" 2>&1; then
    grep -E -B2 -A12 'error|Error' "$log" >&2 || tail -n 40 "$log" >&2
    setup_say "The build failed; the whole log is $log"
    return 1
  fi
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  set -euo pipefail
  cd "$(dirname "$0")/.."
  setup_tools "$@"
  setup_build build
fi
