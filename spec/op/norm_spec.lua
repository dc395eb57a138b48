-- layer_norm and rms_norm against their formulas in f64, forward and backward, for the shapes that models use.
local helper = require "spec.helper"
local moe = require "moe"

-- The same made of elementary operations.
local function reference(x, w, b, eps, center)
  local dims = {}
  for d = 1, w and #w.shape or 1 do dims[d] = -d end
  local c = center and x - x:mean(dims, true) or x
  local y = c / ((c * c):mean(dims, true) + eps):sqrt()
  if w then y = y * w end
  if b then y = y + b end
  return y
end

local function leaf(...)
  local x = moe.randn(...)
  x.requires_grad = true
  return x
end

local shapes = {
  { { 3, 5 }, { 5 } }, { { 1, 1 }, { 1 } }, { { 7, 64 }, { 64 } }, { { 2, 3, 33 }, { 33 } }, { { 2, 3, 4 }, { 3, 4 } },
  { { 500, 65 }, { 65 } }, { { 3, 5000 }, { 5000 } }, { { 6 }, { 6 } },
}

for _, name in ipairs { "layer_norm", "rms_norm" } do
  local center = name == "layer_norm"
  describe(name, function()
    for _, dtype in ipairs { "f64", "f32" } do
      for _, s in ipairs(shapes) do
        local label = table.concat(s[1], "x") .. " " .. dtype
        it("forward and gradients of " .. label, function()
          for _, with in ipairs { { true, true }, { true, false }, { false, false }, { false, true } } do
            if center or not with[2] then
              local o = { dtype = dtype }
              local x = leaf(s[1], o)
              local w = with[1] and leaf(s[2], o) or nil
              local b = with[2] and leaf(s[2], o) or nil
              if #s[2] == 1 or with[1] or with[2] then
                local g = moe.randn(s[1], o)
                local y
                if center then y = moe.layer_norm(x, w, b, 1e-3) else y = moe.rms_norm(x, w, 1e-3) end
                y:backward(g)
                local x2 = x:detach():to "f64"
                x2.requires_grad = true
                local w2, b2 = w and w:detach():to "f64", b and b:detach():to "f64"
                if w2 then w2.requires_grad = true end
                if b2 then b2.requires_grad = true end
                local e
                if w2 or not b2 then
                  e = reference(x2, w2, b2, 1e-3, center)
                else
                  e = reference(x2, moe.ones(s[2], { dtype = "f64" }), b2, 1e-3, center)
                end
                e:backward(g:to "f64")
                local tol = dtype == "f64" and { rtol = 1e-9, atol = 1e-10 } or { rtol = 1e-4, atol = 2e-5 }
                assert.close(e, y, tol)
                assert.close(x2.grad, x.grad, tol)
                if w then assert.close(w2.grad, w.grad, { rtol = tol.rtol, atol = tol.atol * 20 }) end
                if b then assert.close(b2.grad, b.grad, { rtol = tol.rtol, atol = tol.atol * 20 }) end
              end
            end
          end
        end)
      end
    end

    it("takes strided inputs, half types, empty sizes", function()
      local x, w = moe.randn(4, 9), moe.randn(9)
      local y = moe[name](x, w)
      for _, view in ipairs(helper.views(x)) do assert.close(y, moe[name](view[2], w), { rtol = 0, atol = 0 }) end
      for _, dtype in ipairs { "bf16", "f16" } do
        local h = moe[name](x:to(dtype), w:to(dtype))
        assert.equal(dtype, h.dtype)
        assert.close(y, h:to "f32", { rtol = 0.05, atol = 0.05 })
      end
      assert.same({ 0, 9 }, moe[name](moe.zeros(0, 9), w).shape)
      assert.same({ 2, 0 }, moe[name](moe.zeros(2, 0)).shape)
      local e, we = leaf(0, 9), leaf(9)
      moe[name](e, we):sum():backward()
      assert.same(moe.zeros(9):totable(), we.grad:totable())
    end)

    it("is the same to the bit for any number of threads, gradients included", function()
      local x, w, g = moe.randn(768, 128), moe.randn(128), moe.randn(768, 128)
      local function run()
        local xl, wl = x:clone(), w:clone()
        xl.requires_grad, wl.requires_grad = true, true
        local y = moe[name](xl, wl)
        y:backward(g)
        return { y:totable(), xl.grad:totable(), wl.grad:totable() }
      end
      local before = moe.threads()
      moe.threads(1)
      local one = run()
      moe.threads(2)
      assert.same(one, run())
      moe.threads(before)
    end)

    it("a constant row has no direction: finite, and finite gradients", function()
      local x = moe.full({ 2, 4 }, center and 3 or 0)
      x.requires_grad = true
      local y = moe[name](x)
      assert.close(moe.zeros(2, 4), y)
      y:sum():backward()
      assert.is_true(x.grad:sum():item() == x.grad:sum():item())
    end)

    it("messages", function()
      local x = moe.zeros(2, 3)
      assert.matches(name .. ": weight must have the shape of x's last dimensions: weight is %[4%], x is %[2, 3%]",
        helper.error_of(moe[name], x, moe.ones(4)))
      assert.matches("weight must have", helper.error_of(moe[name], x, moe.ones(1, 2, 3)))
      assert.matches("weight must have", helper.error_of(moe[name], x, moe.tensor(1)))
      assert.matches("must be floating, got i64", helper.error_of(moe[name], x:to "i64"))
      assert.matches("eps must not be negative", helper.error_of(moe[name], x, { eps = -1 }))
      assert.matches("no dimension", helper.error_of(moe[name], moe.tensor(1)))
    end)
  end)
end

it("layer_norm: a large mean does not swallow the variance", function()
  local y = moe.tensor({ 10000, 10001, 10002 }):layer_norm({ eps = 0 })
  assert.close({ -1.224745, 0, 1.224745 }, y, { rtol = 1e-3, atol = 1e-3 })
end)

it("layer_norm: weight and bias of different shapes are refused", function()
  assert.matches("weight and bias must have one shape",
    helper.error_of(moe.layer_norm, moe.zeros(2, 3), moe.ones(3), moe.ones(2, 3)))
end)
