--- MoHD: Mixture of Hidden-Dimensions Transformer (Chen, Shang, Zhang, Sheng, Liu, Wang, Sun, Wu, Wang 2024, arXiv 2412.05644).
--
--   groups of hidden dimensions:  S = {shared} u top-k of softmax(x W_r) over the others
--   reading:   h = a sum_{g in S} g_g W_in[:, g] x[g],   a = groups / |S|      activation scaling
--   writing:   y[g] = W_out[g, :] f(h) for g in S, 0 else
--   fusion:    z[g] = sum_g' M[g, g'] y[g'],   M = I to begin with             group fusion
--
-- The residual stream is several times as wide as what a token's attention and feed-forward network read and write of it:
-- products are over the active slices alone (moe.nn.sliced_linear), so that a token costs what a narrow model costs. The default
-- layer routes whole networks; here the networks stay, and the dimensions are routed. Of the paper's text the forms of scaling
-- and fusion and the gate (1, with the gradient of the softmax) are ours; shared groups come first.

local moe = require "moe"
local nn, core = moe.nn, moe.core

local M = {
  title = "MoHD", paper = "arXiv 2412.05644", number = 61,
  claim = "three times the hidden width at the same active width beats the narrow model; without scaling it is worse",
  outcome = "reproduced: 2.596 against 3.04 of the narrow model, 2.621 without scaling (100 steps, three seeds)",
}

-- The choice of groups: the first o.shared always, and the o.active - o.shared best of the others.
local Choice = nn.module "groups"

function Choice:init(o)
  self._shared, self._groups = o.shared, o.groups
  self.best = o.active < o.groups and moe.router.topk {
    d_model = o.d_model, num_experts = o.groups - o.shared, top_k = o.active - o.shared, norm_topk_prob = false,
  } or nil
end

function Choice:route(x, ctx)
  local T, S, G = x:size(1), self._shared, self._groups
  if not self.best then
    local all = core.ones({ T, G }, { dtype = x.dtype })
    return moe.routing.dense(all, { mask = ctx.mask, probs = all / G })
  end
  local inner = self.best:route(x, ctx)
  local p, none = inner.gate, core.zeros({ T, S }, { dtype = inner.gate.dtype })
  local index = core.cat({ (none + core.arange(1, S)):to "i64", inner.index + S }, 2)
  local weight = core.cat({ none + 1, p - p:detach() + 1 }, 2)
  return moe.routing.topk(index, weight, G, { mask = ctx.mask, probs = core.cat({ none, inner.probs }, 2) })
end

local Part = nn.module "part"

-- reads: how wide what is read is; writes: how wide what is written from; work(h, ctx).
function Part:init(o, reads, writes, work)
  self.read = nn.sliced_linear {
    in_features = o.d_model, out_features = reads, num_groups = o.groups, weighted = true, init = "normal(0.02)",
  }
  self.write = nn.sliced_linear {
    in_features = writes, out_features = o.d_model, num_groups = o.groups, side = "out",
    init = ("normal(%g)"):format(0.02 / math.sqrt(2 * o.num_layers)),
  }
  self.fusion = nn.parameter(core.eye(o.groups))
  self._scale, self._groups, self._work = o.scaling == false and 1 or o.groups / o.active, o.groups, work
end

function Part:forward(x, routing, ctx)
  local y = self.write(self._work(self.read(x, routing) * self._scale, ctx), routing)
  local T, D = y:size(1), y:size(2)
  return self.fusion:matmul(y:reshape { T, self._groups, D // self._groups }):reshape { T, D }
end

local function layer(o, ...)
  local part = Part(o, ...)
  return moe.layer {
    d_model = o.d_model, num_experts = o.groups, router = Choice(o), experts = part, balance = { moe.loss.switch(0.01) },
  }
end

--- The feed-forward part: o.hidden wide, on o.active of o.groups groups of o.d_model, o.shared of them always on.
function M.ffn(o) return layer(o, o.hidden, o.hidden, function(h) return h:gelu() end) end

--- The attention part: o.num_heads heads over as many dimensions as are active.
function M.mixer(o)
  local width, H = o.d_model * o.active // o.groups, o.num_heads
  local part = layer(o, 3 * width, width, function(h, ctx)
    local B, T = ctx.shape[1], ctx.shape[2]
    local q, k, v = h:reshape { B, T, 3, H, width // H }:permute { 3, 1, 4, 2, 5 }:unbind(1)
    return core.attention(q, k, v, { causal = true }):transpose(2, 3):reshape { B * T, width }
  end)
  local mixer = nn.lambda(function(x, _, ctx) return (part(x, ctx)) end)
  mixer.part = part
  return mixer
end

--- The language model: hidden width o.expand (3) times o.d_model, of which as much as o.d_model is active: o.active of o.groups
-- (8 of 24) groups, o.shared (a quarter of them) always. scaling = false leaves it out.
function M.model(o)
  local expand, groups = o.expand or 3, o.groups or (o.expand or 3) * 8
  local active = o.active or groups // expand
  local own = setmetatable({
    d_model = o.d_model * expand, groups = groups, active = active, shared = o.shared or active // 4, hidden = o.hidden or 4 * o.d_model,
  }, { __index = o })
  return moe.model.lm {
    vocab_size = o.vocab_size, d_model = own.d_model, num_layers = o.num_layers, max_seq_len = o.max_seq_len,
    mixer = function() return M.mixer(own) end, ffn = function() return M.ffn(own) end,
  }
end

return M
