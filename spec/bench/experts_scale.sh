# What an expert layer costs as the number of experts grows; run.sh calls it with the paths set.
[ -n "${LUA:-}" ] || { . examples/setup.sh; setup_lua; }
"$LUA" spec/bench/experts_scale.lua
