# Linear recurrences against the rate of a large product and against attention; run.sh calls it with the paths set.
[ -n "${LUA:-}" ] || { . examples/setup.sh; setup_lua; }
"$LUA" spec/bench/recurrence.lua
