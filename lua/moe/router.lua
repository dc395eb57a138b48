--- moe.router: what decides. A router answers route(x, ctx) for x [T, d_model] with a routing; so does a plain function
-- (x, ctx). One made without d_model is a description: bind{ d_model =, num_experts = } makes the router.

local core = require "moe.core"
local nn = require "moe.nn"
local options = require "moe.nn.options"
local sparse = core._sparse

local M = {}

local TopK = nn.module "topk"

local ROWS <const> = {
  d_model = { "integer" }, num_experts = { "integer" }, top_k = { "integer", 2 },
  score = { { "softmax", "sigmoid", "sqrtsoftplus", "relu" }, "softmax" }, score_after = { "boolean", false },
  norm_topk_prob = { "boolean" }, routed_scaling_factor = { "number", 1 },
  n_group = { "integer", 1 }, topk_group = { "integer", 1 }, group_top = { "integer", 0 },
  bias = { "boolean", false }, selection_bias = { "boolean", false },
  noise = { "string|number" }, noise_in_eval = { "boolean", false }, jitter = { "number", 0 },
  init = { "string|number|function" }, dtype = { "string" }, device = { "string" },
}

local function fail(text, ...) error("router.topk: " .. text:format(...), 4) end

local function check(o)
  local k, E = o.top_k, o.num_experts
  if k < 1 then fail("option 'top_k' must be at least 1, got %d", k) end
  if E and k > E then fail("top_k is %d, but there are %d experts", k, E) end
  if k == 1 and o.norm_topk_prob then
    fail "norm_topk_prob with top_k = 1 makes every weight 1 and cuts the router off from its gradient"
  end
  if k == 1 and o.score_after and o.score == "softmax" then
    fail "a softmax over one choice (score_after with top_k = 1) is always 1 and cuts the router off from its gradient"
  end
  if o.noise and o.noise ~= "learned" and type(o.noise) ~= "number" then
    fail("option 'noise' must be \"learned\" or a standard deviation, got %q", o.noise)
  end
  if o.jitter < 0 or o.jitter >= 1 then fail("option 'jitter' must be in [0, 1), got %g", o.jitter) end
end

function TopK:init(given)
  local o = options.read("router.topk", given, ROWS, 2)
  check(o)
  self._options = o
  if not o.d_model then return end
  if not o.num_experts then fail "option 'num_experts' is missing" end
  local E, d = o.num_experts, o.d_model
  self.d_model, self.num_experts, self.top_k = d, E, o.top_k
  local settings = { dtype = o.dtype or "f32", device = o.device }
  local function projection(what, bias)
    local w = core.zeros({ E, d }, settings)
    local r = 1 / math.sqrt(d)
    if o.init ~= nil then nn.init.apply(w, o.init) else nn.init.uniform_(w, -r, r) end
    self[what .. "weight"] = nn.parameter(w)
    if bias then
      local b = core.zeros({ E }, settings)
      if o.init == nil then nn.init.uniform_(b, -r, r) end
      self[what .. "bias"] = nn.parameter(b, { decay = false })
    end
  end
  projection("", o.bias)
  if o.noise == "learned" then projection("noise_", o.bias) end
  if o.selection_bias then self:buffer("expert_bias", core.zeros({ E }, { dtype = "f32", device = o.device })) end
  self._call = {
    top_k = o.top_k, score = o.score, score_after = o.score_after, n_group = o.n_group, topk_group = o.topk_group,
    group_top = o.group_top, routed_scaling_factor = o.routed_scaling_factor,
    norm_topk_prob = o.norm_topk_prob == nil and o.top_k > 1 and not o.score_after or o.norm_topk_prob == true,
  }
end

--- The same router for these sizes: itself when it has weights already, else a new one.
function TopK:bind(sizes)
  if self.d_model then
    for _, key in ipairs { "d_model", "num_experts" } do
      if sizes[key] and sizes[key] ~= self[key] then
        error(("router.topk: the router has %s = %d, the layer wants %d"):format(key, self[key], sizes[key]), 2)
      end
    end
    return self
  end
  local given = {}
  for k, v in pairs(self._options) do given[k] = v end
  for _, key in ipairs { "d_model", "num_experts", "dtype", "device", "selection_bias" } do
    given[key] = given[key] or sizes[key]
  end
  return TopK(given)
end

--- The logits [T, E] of x [T, d_model], noise included.
function TopK:logits(x)
  local o = self._options
  if x.dtype ~= "f64" and x.dtype ~= "f32" then x = x:to "f32" end -- a router decides in f32 at least
  if o.jitter > 0 and self.training then x = x * (core.rand_like(x:detach()) * (2 * o.jitter) + (1 - o.jitter)) end
  local logits = x:linear(self.weight, self.bias)
  if o.noise and (self.training or o.noise_in_eval) then
    local noise = core.randn_like(logits:detach())
    if o.noise == "learned" then
      noise = noise * x:linear(self.noise_weight, self.noise_bias):softplus()
    else
      noise = noise * o.noise
    end
    logits = logits + noise
  end
  return logits
end

function TopK:route(x, ctx)
  if not self.d_model then error("router.topk: this is a description without weights: give d_model and num_experts", 0) end
  ctx = ctx or {}
  local logits, call = self:logits(x), self._call
  call.bias, call.mask, call.choice = self.expert_bias, ctx.mask, ctx.choice
  local weight, index, score = core.router_topk(logits, call)
  call.bias, call.mask, call.choice = nil, nil, nil
  local routing = sparse.topk(index, weight, self.num_experts, ctx.mask)
  routing.logits = logits
  routing.top_k = self.top_k
  -- probabilities sum to one, whatever the scores do
  routing.probs = self._options.score == "softmax" and score or score / (score:sum(-1, true) + 1e-20)
  return routing
end

TopK.forward = TopK.route

function TopK:extra()
  local o = self._options
  local parts = { ("top_k=%d, score=%s"):format(o.top_k, o.score) }
  if self.d_model then table.insert(parts, 1, ("%d -> %d"):format(self.d_model, self.num_experts)) end
  if o.n_group > 1 then parts[#parts + 1] = ("%d of %d groups"):format(o.topk_group, o.n_group) end
  if o.noise then parts[#parts + 1] = "noise=" .. tostring(o.noise) end
  return table.concat(parts, ", ")
end

--- The k best experts of each token. Steps, each an option: `score` of the logits (softmax, sigmoid, sqrtsoftplus, relu;
-- `score_after`: of the chosen alone) -> + `selection_bias` -> `n_group` groups, of which `topk_group` stay, judged
-- by the sum of their `group_top` best -> choose `top_k` -> their unbiased scores -> `norm_topk_prob` (default: for
-- k > 1) -> `routed_scaling_factor`. Also: `bias` of the projection, `noise` ("learned" or a number) added to the
-- logits in training (`noise_in_eval`: always), `jitter` (x times 1 +- jitter in training), `init`.
M.topk = TopK

--- The choice "token t takes experts t k + 1, t k + 2, ..." modulo num_experts, as [T, k]: an even load, for experiments.
function M.uniform_choice(tokens, top_k, num_experts)
  for i, v in ipairs { tokens or false, top_k or false, num_experts or false } do
    if math.type(v) ~= "integer" or v < (i == 1 and 0 or 1) then
      error(("router.uniform_choice: argument %d must be a count, got %s"):format(i, tostring(v)), 2)
    end
  end
  return core.arange(0, tokens * top_k - 1):to "i64":remainder(num_experts):reshape { tokens, top_k } + 1
end

return M
