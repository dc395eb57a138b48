# A step of a product-key memory of 1,048,576 entries against one of 65,536; run.sh calls it with the paths set.
[ -n "${LUA:-}" ] || { . examples/setup.sh; setup_lua; }
"$LUA" spec/bench/memory_layer.lua
