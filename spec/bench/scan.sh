# The selective scan, ours and PyTorch's step by step; run.sh calls it with the paths set.
[ -n "${LUA:-}" ] || { . examples/setup.sh; setup_lua; }
"$LUA" spec/bench/scan.lua
python=${MOE_BENCH_PYTHON:-python3}
if "$python" -c 'import torch' 2>/dev/null; then "$python" spec/bench/scan_torch.py; fi
