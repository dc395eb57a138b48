--- moe.experts: what works on routed tokens. A bank of networks keeps its weights in single tensors [num_experts, ...],
-- so that one grouped product serves them all.
--
-- A bank answers bank(x, routing [, ctx]) for x [T, d_model]; without a routing, a bank of one expert is a dense network
-- on x [.., d_model]. One made without d_model is a description: bind{ d_model =, num_experts = } makes the bank,
-- as moe.layer does.

-- One file a kind of bank; "file:field" where a file has several.
return require "moe.lazy"({}, {
  swiglu = "moe.experts.gated:swiglu", glu = "moe.experts.gated:glu", geglu = "moe.experts.gated:geglu",
  mlp = "moe.experts.mlp", map = "moe.experts.map", spawn = "moe.experts.spawn",
  lora = "moe.experts.lora", lora_linear = "moe.experts.lora_linear", lora_ffn = "moe.experts.lora_ffn",
  adapter = "moe.experts.adapter", zero_computation = "moe.experts.zero_computation",
  join = "moe.experts.join", unequal = "moe.experts.unequal", film = "moe.experts.film", ia3 = "moe.experts.ia3",
  ternary = "moe.experts.ternary:ternary", low_bit = "moe.experts.ternary:low_bit",
})
