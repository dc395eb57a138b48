-- moe.mixer: sequence mixers, all called as `y = mixer(x)` or `y, state = mixer(x, state)`.

local core = require "moe.core"
require "moe.nn.module" -- gives C layers the protocol of modules

local M = {}
for name, make in pairs(core._module.make.mixer or {}) do M[name] = make end

return require "moe.lazy"(M, {
  mamba = "moe.mixer.mamba", with_map = "moe.attention_map:with_map", attention_weights = "moe.attention_map:weights",
  mla = "moe.mixer.mla",
  mixture_of_heads = "moe.sparse.heads:mixture_of_heads", mixture_of_attention = "moe.sparse.heads:mixture_of_attention",
  mamba2 = "moe.mixer.mamba2", retention = "moe.mixer.retention", gla = "moe.mixer.gla", lightning = "moe.mixer.lightning",
  based = "moe.mixer.based", rwkv7 = "moe.mixer.rwkv7",
  delta = "moe.mixer.delta", gated_delta = "moe.mixer.gated_delta", kda = "moe.mixer.kda",
  stick_breaking = "moe.sparse.heads:stick_breaking", modality_attention = "moe.sparse.modality:modality_attention",
})
