#!/usr/bin/env bash
# Installs what is missing, builds, and trains a mixture-of-experts language model for about a minute: on the project's
# own source text, or on a file or directory of yours: bash examples/quickstart.sh --data my.txt
# All options of examples/train_lm.lua may follow.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup.sh
setup_tools
setup_build build
export LUA_PATH="./lua/?.lua;./lua/?/init.lua;;" LUA_CPATH="./build/?.so;;"
exec "$LUA" examples/train_lm.lua --arch moe --seconds 60 "$@"
