--- BigMac: A Communication-Efficient Mixture-of-Experts Model Structure for Fast Training and Inference (Jin et al. 2025,
-- arXiv 2502.16927).
--
--   y = W_u sum_{e in top k} g_e E_e(W_d x),    g = softmax(W x),    E_e: r -> h -> r,    W_d [r, d], W_u [d, r]
--
-- Fine-grained experts whose rows travel between machines at r instead of d numbers: a token descends before it is
-- dispatched and ascends after its experts' outputs came back and were combined (DCCA), where a usual fine-grained layer
-- sends rows of d and its narrow experts d -> I -> d do both themselves (CDAC). Experts are wide where they were narrow: h
-- is such that the whole layer has the parameters of that of E experts d -> I -> d. The router sees the full x. That one W_d
-- and one W_u serve all experts is our reading.

local moe = require "moe"
local nn = moe.nn

local M = {
  title = "BigMac: descend before dispatch, ascend after combine", paper = "arXiv 2502.16927", number = 31,
  claim = "all-to-all bytes fall to r / d of a usual fine-grained layer's, at its loss for equal parameters",
  outcome = "reproduced, machines simulated in one process with a byte counter: bytes exactly r / d = 1/4; loss 2.474 +- 0.021 "
    .. "against 2.503 +- 0.073 (three seeds, 300 steps)",
}

-- Weights that keep the scale of what passes through them: two more matrices in a row would shrink it.
local function keeping(w) return w:normal_(0, w:size(2) ^ -0.5) end

local Descended = nn.module "descended"

--- A bank between two projections: descended{ bank, rank = r }. Parameters descend [r, d], ascend [d, r] and those of the
-- bank.
function Descended:init(given) self._options = given end

function Descended:bind(sizes)
  local o, m = self._options, Descended(self._options)
  local d, r = sizes.d_model, o.rank
  m.d_model, m.num_experts = d, sizes.num_experts
  m.descend = nn.linear { in_features = d, out_features = r, bias = false }
  m.ascend = nn.linear { in_features = r, out_features = d, bias = false }
  nn.init.apply(m.descend.weight:detach(), keeping)
  nn.init.apply(m.ascend.weight:detach(), keeping)
  m.bank = o[1]:bind { d_model = r, num_experts = sizes.num_experts, dtype = sizes.dtype, device = sizes.device }
  if sizes.dtype then m:to(sizes.dtype) end
  return m
end

function Descended:forward(x, routing, ctx) return self.ascend(self.bank(self.descend(x), routing, ctx)) end

--- The width h of experts r -> h -> r with which the layer has the parameters of E experts d -> I -> d.
function M.width(d, r, experts, intermediate_size) return (experts * d * intermediate_size - d * r) // (experts * r) end

--- The layer: o.rank is r (default d / 4).
function M.layer(o)
  local d, E, r = o.d_model, o.num_experts, o.rank or o.d_model // 4
  if r < 1 or r > d then error(("bigmac: rank is %d, wanted 1 to d_model = %d"):format(r, d), 2) end
  return moe.layer {
    d_model = d, num_experts = E, dtype = o.dtype, router = moe.router.topk { top_k = o.top_k },
    experts = Descended {
      moe.experts.mlp { intermediate_size = M.width(d, r, E, o.intermediate_size), init = keeping }, rank = r,
    },
    balance = { moe.loss.switch(0.01) },
  }
end

--- The usual fine-grained layer of the same parameters: what travels has d numbers.
M.usual = {
  title = "Fine-grained experts",
  layer = function(o)
    return moe.layer {
      d_model = o.d_model, num_experts = o.num_experts, dtype = o.dtype, router = moe.router.topk { top_k = o.top_k },
      experts = moe.experts.mlp { intermediate_size = o.intermediate_size, init = keeping },
      balance = { moe.loss.switch(0.01) },
    }
  end,
}

--- The layer as `ranks` machines would run it, in one process: tokens and experts are cut into equal runs, each machine
-- routes its own tokens, sends rows to the owners of their experts and combines what comes back. Gives y and the bytes that
-- went from one machine to another.
function M.parallel(layer, x, ranks)
  local experts, E, T = layer.experts, layer.num_experts, x:size(1)
  if E % ranks ~= 0 or T % ranks ~= 0 then
    error(("bigmac: %d tokens and %d experts cannot be cut into %d equal runs"):format(T, E, ranks), 2)
  end
  local bank, share, out, bytes = experts.bank or experts, E // ranks, {}, 0
  for p = 1, ranks do
    local own = x:narrow(1, (p - 1) * (T // ranks) + 1, T // ranks)
    local routing, sum = layer.router:route(own, {}), nil
    local low = experts.descend and experts.descend(own) or own
    for q = 1, ranks do
      local list = {}
      for i = 1, share do list[i] = (q - 1) * share + i end
      local part = routing:pick(list)
      local sent = part:gather(low)
      -- on machine q: whose row it is does not matter there, only which expert it is for
      local of = moe.routing.topk((part.expert + list[1] - 1):reshape { -1, 1 }, nil, E)
      local back = bank(sent, of)
      if p ~= q then bytes = bytes + (sent:numel() + back:numel()) * (sent.dtype == "f64" and 8 or 4) end
      local y = part:combine(back)
      sum = sum and sum + y or y
    end
    out[p] = experts.ascend and experts.ascend(sum) or sum
  end
  return moe.cat(out, 1), bytes
end

return M
