-- A router of one's own, in a few lines: lua5.4 examples/custom_router.lua
--
-- A router is a function (or a table with route(x, ctx)) that returns a routing. This one scores by the cosine of the
-- token with a vector an expert, and sends each token to its two best. The whole layer trains through it.
local moe = require "moe"

local function cosine_router(d_model, num_experts, top_k)
  local centers = moe.randn(num_experts, d_model, { requires_grad = true })
  return {
    centers = centers, -- a field is a parameter of the layer
    route = function(self, x)
      local unit = function(t) return t / (t:norm(2, -1, true) + 1e-6) end
      local scores = unit(x):matmul(unit(self.centers):t()) * 8
      local probs = scores:softmax(-1)
      local weight, index = probs:topk(top_k)
      return moe.routing.topk(index, weight / weight:sum(-1, true), num_experts, { probs = probs })
    end,
  }
end

-- Tokens of four kinds, each with a linear map of its own: what experts are for.
moe.manual_seed(1)
local kinds, d = 4, 16
local place, map = moe.randn(kinds, d) * 2, moe.randn(kinds, d, d) * 0.3
local function batch(n)
  local kind = moe.randint(1, kinds, { n })
  local x = place:index_select(1, kind) + moe.randn(n, d) * 0.5
  local y = moe.bmm(x:unsqueeze(2), map:index_select(1, kind)):squeeze(2)
  return x, y, kind
end

local layer = moe.layer {
  d_model = d, num_experts = 8, router = cosine_router(d, 8, 2), experts = moe.experts.mlp { intermediate_size = 32 },
  balance = { moe.loss.switch(0.01) },
}
local optimizer = moe.optim.adamw(layer, { lr = 3e-3 })
for step = 1, 500 do
  local x, y = batch(256)
  local out, routing = layer(x)
  local loss = moe.mse(out, y)
  local total = loss + routing:aux()
  optimizer:zero_grad()
  total:backward()
  optimizer:step()
  if step == 1 or step % 100 == 0 then print(("step %4d  loss %.4f"):format(step, loss:item())) end
end

local x, _, kind = batch(1000)
local _, routing = layer(x)
print("assignments of each expert:", table.concat(routing:load():totable(), " "))
for k = 1, kinds do
  local mine = kind:index_select(1, routing.token):eq(k)
  print(("kind %d goes to"):format(k), table.concat(moe.bincount(routing.expert:masked_select(mine), 8):totable(), " "))
end
