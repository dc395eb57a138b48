-- The sparse layer once more, slowly: plain loops over tokens and choices, from single-vector operations whose gradients
-- are checked elsewhere. The specs hold the grouped kernels against it, forward and backward.
local moe = require "moe"

local ref = {}

ref.act = {
  silu = function(h) return h:silu() end,
  gelu = function(h) return h * ((h * math.sqrt(0.5)):erf() + 1) * 0.5 end,
  gelu_tanh = function(h) return h * (((h + h * h * h * 0.044715) * math.sqrt(2 / math.pi)):tanh() + 1) * 0.5 end,
  relu = function(h) return h:relu() end,
  relu2 = function(h) return h:relu() * h:relu() end,
  tanh = function(h) return h:tanh() end,
  sigmoid = function(h) return h:sigmoid() end,
  identity = function(h) return h end,
}

-- One network on one vector x [d].
function ref.ffn(p, e, x)
  local h = p.w_in[e]:matmul(x)
  if p.b_in then h = h + p.b_in[e] end
  local a
  if p.gated then
    local I = h:size(1) // 2
    a = ref.act[p.act](h:narrow(1, 1, I)) * h:narrow(1, I + 1, I)
  else
    a = ref.act[p.act](h)
  end
  local y = p.w_out[e]:matmul(a)
  return p.b_out and y + p.b_out[e] or y
end

-- x [T, d], choices = { {token, expert, weight (a scalar tensor)}, ... } -> [T, d_out]
function ref.experts(p, x, choices)
  local T, rows = x:size(1), {}
  for _, c in ipairs(choices) do
    local y = ref.ffn(p, c[2], x[c[1]])
    if c[3] then y = y * c[3] end
    rows[c[1]] = rows[c[1]] and rows[c[1]] + y or y
  end
  for t = 1, T do
    rows[t] = rows[t] or moe.zeros({ p.w_out:size(2) }, { dtype = x.dtype })
  end
  return T > 0 and moe.stack(rows) or moe.zeros({ 0, p.w_out:size(2) }, { dtype = x.dtype })
end

-- The choices of index [T, k] (a table, 0 = none) and weight (a tensor [T, k]).
function ref.choices(index, weight)
  local out = {}
  for t, row in ipairs(index) do
    for k, e in ipairs(row) do
      if e > 0 then out[#out + 1] = { t, e, weight and weight:narrow(1, t, 1):narrow(2, k, 1):reshape({}) } end
    end
  end
  return out
end

local function softplus(v) return v > 30 and v or math.log(1 + math.exp(v)) end

local function scores(row, kind)
  local s = {}
  if kind == "softmax" then
    local top, sum = math.max(table.unpack(row)), 0
    for e, v in ipairs(row) do
      s[e] = math.exp(v - top)
      sum = sum + s[e]
    end
    for e = 1, #row do s[e] = s[e] / sum end
  else
    for e, v in ipairs(row) do
      s[e] = kind == "sigmoid" and 1 / (1 + math.exp(-v)) or kind == "relu" and math.max(v, 0) or math.sqrt(softplus(v))
    end
  end
  return s
end

-- Positions of the k largest, the first of equals.
local function best(keys, k)
  local order = {}
  for i = 1, #keys do order[i] = i end
  table.sort(order, function(a, b)
    if keys[a] ~= keys[b] then return keys[a] > keys[b] end
    return a < b
  end)
  return table.move(order, 1, k, 1, {})
end

-- The router's order of steps on one row of logits (a table): index and weight, tables of k.
function ref.route(row, o)
  local s = scores(row, o.score)
  local from = o.score_after and row or s
  local key = {}
  for e = 1, #row do key[e] = from[e] + (o.bias and o.bias[e] or 0) end
  local G = o.n_group or 1
  if G > 1 then
    local size, judge = #row // G, {}
    local top = o.group_top or math.max(1, o.top_k // o.topk_group)
    for g = 1, G do
      local group = table.move(key, (g - 1) * size + 1, g * size, 1, {})
      judge[g] = 0
      for _, i in ipairs(best(group, top)) do judge[g] = judge[g] + group[i] end
    end
    local stays = {}
    for _, g in ipairs(best(judge, o.topk_group)) do stays[g] = true end
    for e = 1, #row do
      if not stays[(e - 1) // size + 1] then key[e] = -math.huge end
    end
  end
  local index, weight = best(key, o.top_k), {}
  for i, e in ipairs(index) do weight[i] = from[e] end
  if o.score_after then weight = scores(weight, o.score) end
  if o.norm_topk_prob then
    local sum = 1e-20
    for _, w in ipairs(weight) do sum = sum + w end
    for i = 1, #weight do weight[i] = weight[i] / sum end
  end
  for i = 1, #weight do weight[i] = weight[i] * (o.routed_scaling_factor or 1) end
  return index, weight, s
end

return ref
