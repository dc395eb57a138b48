--- moe.gradcheck(f, inputs, options): the gradients of f against central differences, in f64.
--
-- f(inputs...) returns one tensor or several; what is not a floating tensor is ignored. The results are drawn
-- together into one number L = sum of result * weight with fixed weights that no symmetry of f can hide behind,
-- and dL/dx from the graph is compared with (L(x + eps) - L(x - eps)) / (2 eps) for every element of every input.
--
--   inputs   tensors; the f64 ones among them are checked, others (indices, masks) are handed on
--   options  eps = 1e-6, rtol = 1e-5, atol = 1e-7
--            seed = n: moe.manual_seed(n) before every call of f, for an f that draws random numbers
-- Returns true, or raises an error that names the input, the element, and both values.

local OPTIONS = { eps = true, rtol = true, atol = true, seed = true }

local function position(i, shape)
  local at, rest = {}, i - 1
  for d = #shape, 1, -1 do
    at[d] = rest % shape[d] + 1
    rest = rest // shape[d]
  end
  return "{" .. table.concat(at, ", ") .. "}"
end

local function flatten(value, into)
  if type(value) ~= "table" then
    into[#into + 1] = value
  else
    for i = 1, #value do flatten(value[i], into) end
  end
  return into
end

local function is_float(t) return t.dtype == "f64" or t.dtype == "f32" or t.dtype == "bf16" or t.dtype == "f16" end

local function gradcheck(f, inputs, options)
  local moe = require "moe"
  if type(f) ~= "function" and not (getmetatable(f) or {}).__call then
    error("gradcheck: argument 1 must be a function, got a " .. type(f), 2)
  end
  if type(inputs) ~= "table" then error("gradcheck: argument 2 must be a list of tensors, got a " .. type(inputs), 2) end
  options = options or {}
  for key in pairs(options) do
    if not OPTIONS[key] then error(("gradcheck: unknown option '%s' (eps, rtol, atol, seed)"):format(tostring(key)), 2) end
  end
  local eps, rtol, atol = options.eps or 1e-6, options.rtol or 1e-5, options.atol or 1e-7

  local n = #inputs
  local checked, leaves = {}, {}
  for i = 1, n do
    local x = inputs[i]
    if type(x) ~= "userdata" then
      error(("gradcheck: input %d must be a tensor, got a %s"):format(i, type(x)), 2)
    elseif x.dtype == "f64" then
      -- A leaf of our own with the same strides: the caller's tensor keeps its history and its grad.
      local leaf = x:detach()
      leaf.requires_grad = true
      checked[#checked + 1], leaves[i] = i, leaf
    elseif is_float(x) then
      error(("gradcheck: input %d is %s; differences need f64"):format(i, x.dtype), 2)
    else
      leaves[i] = x
    end
  end
  if #checked == 0 then error("gradcheck: no input is an f64 tensor", 2) end

  local weights = {}
  local function weight_of(k, y)
    local w = weights[k]
    if w == nil then
      local values, count = {}, y:numel()
      for i = 1, count do values[i] = math.sin(1.7 * i + k) + 0.3 end
      if count == 0 then
        w = false
      elseif #y.shape == 0 then
        w = moe.tensor(values[1], { dtype = "f64" })
      else
        w = moe.tensor(values, { dtype = "f64" }):reshape(y.shape)
      end
      weights[k] = w
    end
    return w
  end
  local function total(...)
    if options.seed then moe.manual_seed(options.seed) end
    local results, sum = table.pack(f(...)), nil
    for k = 1, results.n do
      local y = results[k]
      if type(y) == "userdata" and is_float(y) then
        local w = weight_of(k, y)
        if w then
          local part = (y:to "f64" * w):sum()
          sum = sum and sum + part or part
        end
      end
    end
    return sum
  end

  local loss = total(table.unpack(leaves, 1, n))
  if loss == nil then return true end -- nothing but empty results
  local wanted = {}
  for k, i in ipairs(checked) do wanted[k] = leaves[i] end
  local grads = {}
  if loss.requires_grad then grads = { moe.grad(loss, wanted) } end

  for k, i in ipairs(checked) do
    local x = inputs[i]
    local shape = x.shape
    local analytic = grads[k] and flatten(grads[k]:totable(), {}) or {}
    if grads[k] then
      local got = grads[k].shape
      if table.concat(got, ",") ~= table.concat(shape, ",") then
        error(("gradcheck: the gradient of input %d has shape [%s], the input [%s]"):format(i, table.concat(got, ", "),
          table.concat(shape, ", ")), 2)
      end
    end
    local moved = x:detach():contiguous():clone()
    local flat = moved:reshape({ -1 })
    local args = table.move(leaves, 1, n, 1, {})
    args[i] = moved
    local function at(j, value)
      flat[j] = value
      return moe.no_grad(function() return total(table.unpack(args, 1, n)):item() end)
    end
    for j = 1, x:numel() do
      local value = flat[j]
      if type(value) == "userdata" then value = value:item() end
      local up, down = value + eps, value - eps
      local numeric = (at(j, up) - at(j, down)) / (up - down)
      flat[j] = value
      local got = analytic[j] or 0
      local err = math.abs(got - numeric)
      local allowed = atol + rtol * math.max(math.abs(numeric), math.abs(got))
      if err > allowed or err ~= err then
        error(("gradcheck: input %d [%s], element %s: analytic %.10g, numeric %.10g (error %.3g, allowed %.3g)%s"):format(i,
          table.concat(shape, ", "), position(j, shape), got, numeric, err, allowed,
          grads[k] and "" or "; the graph has no gradient for this input"), 2)
      end
    end
  end
  return true
end

return gradcheck
