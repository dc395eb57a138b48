# Decoding near and far; run.sh calls it with the paths set.
[ -n "${LUA:-}" ] || { . examples/setup.sh; setup_lua; }
"$LUA" spec/bench/decode.lua
