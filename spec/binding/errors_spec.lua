-- What a message says: the function, the argument, what came and what was wanted; the line of the caller.
local helper = require "spec.helper"
local moe = require "moe"

local function ones(...) return moe.ones(...) end

-- { call, parts that the message must hold ... }
local CASES = {
  { function() return ones(4, 8):matmul(ones(7, 3)) end, "matmul", "[4, 8]", "[7, 3]", "8", "7" },
  { function() return ones(2, 3) + ones(2, 4) end, "add", "[2, 3]", "[2, 4]" },
  { function() return moe.add(ones(2)) end, "add", "argument 2" },
  { function() return moe.add("x", ones(2)) end, "add", "argument 1", "string" },
  { function() return ones(2, 3):sum(0) end, "sum", "0" },
  { function() return ones(2, 3):sum(3) end, "sum", "3" },
  { function() return ones(2, 3):sum(-3) end, "sum", "-3" },
  { function() return ones(2, 3):sum { dmi = 1 } end, "sum", "dmi", "dim" },
  { function() return ones(2, 3):sum { dim = "x" } end, "sum", "dim" },
  { function() return ones(2, 3):transpose(1, 5) end, "transpose", "5" },
  { function() return ones(2, 3):reshape { 4, 2 } end, "reshape", "[2, 3]", "[4, 2]" },
  { function() return ones(2, 3):reshape { -1, -1 } end, "reshape" },
  { function() return ones(2, 3):view { 7 } end, "view", "[2, 3]" },
  { function() return ones(2, 3):select(1, 3) end, "select", "3" },
  { function() return ones(2, 3):select(1, 0) end, "select", "0" },
  { function() return ones(2, 3):narrow(1, 2, 2) end, "narrow" },
  { function() return ones(2, 3)[3] end, "3", "2" },
  { function() return ones(2, 3)[0] end, "0" },
  { function() return ones(2, 3)[1.5] end, "1.5" },
  { function() return ones(2, 3).no_such_field end, "no_such_field" },
  { function() ones(2, 3).no_such_field = 1 end, "no_such_field" },
  { function() return moe.no_such_function(1) end },
  { function() return ones(2, 3):item() end, "item", "[2, 3]" },
  { function() return ones(2, 3):backward() end, "backward" },
  { function() return moe.ones(2, 3, { requires_grad = true }):backward() end, "backward", "[2, 3]" },
  { function() return moe.zeros(-1) end, "zeros", "-1" },
  { function() return moe.zeros(1 << 40, 1 << 40) end, "zeros" },
  { function() return moe.zeros { 1.5 } end, "zeros" },
  { function() return moe.zeros(2, { dtype = "f33" }) end, "zeros", "f33", "f32" },
  { function() return moe.zeros(2, { dtpe = "f32" }) end, "zeros", "dtpe", "dtype" },
  { function() return moe.zeros(2, { device = "tpu" }) end, "zeros", "tpu" },
  { function() return moe.zeros(2, { device = "cuda:77" }) end, "cuda" },
  { function() return moe.tensor { { 1, 2 }, { 3 } } end, "tensor" },
  { function() return moe.tensor { 1, "x" } end, "tensor", "string" },
  { function() return moe.tensor(nil) end, "tensor", "nil" },
  { function() return ones(2):to "f33" end, "f33" },
  { function() return moe.cat({}, 1) end, "cat" },
  { function() return moe.cat({ ones(2, 3), ones(3, 4) }, 1) end, "cat", "[2, 3]", "[3, 4]" },
  { function() return moe.cat({ ones(2, 3), 5 }, 1) end, "cat", "2" },
  { function() return moe.stack { ones(2, 3), ones(3, 4) } end, "stack", "[2, 3]", "[3, 4]" },
  { function() return moe.einsum("ij,jk->ik", { ones(2, 3), ones(4, 5) }) end, "einsum" },
  { function() return moe.einsum("ij->", { ones(2, 3), ones(4, 5) }) end, "einsum" },
  { function() return ones(2, 3):softmax(4) end, "softmax", "4" },
  { function() return ones(2, 3):topk(4) end, "topk", "4", "3" },
  { function() return ones(2, 3):gather(1, ones(2, 3)) end, "gather" },
  { function() return ones(2, 3):gather(1, moe.tensor({ { 3, 1, 1 } }, { dtype = "i64" })) end, "gather", "3", "2" },
  { function() return ones(2, 3):gather(1, moe.tensor({ { 0, 1, 1 } }, { dtype = "i64" })) end, "gather", "0" },
  { function() return ones(2, 3):index_select(1, moe.tensor({ 5 }, { dtype = "i64" })) end, "index_select", "5", "2" },
  { function() return ones(2, 3):dropout(1.5) end, "dropout", "1.5" },
  { function() return moe.embedding(ones(3, 4), moe.tensor({ 4 }, { dtype = "i64" })) end, "embedding", "4", "3" },
  { function() return moe.manual_seed "x" end, "manual_seed" },
  { function() return moe.no_grad(5) end, "no_grad", "function" },
  { function() return moe.grad(ones(1), { ones(1) }) end, "grad" },
  { function() return moe.fn {} end, "fn", "forward" },
  { function() return moe.fn { forward = print, bakward = print } end, "fn", "bakward" },
  { function() return moe.autocast("f33", print) end, "autocast", "f33" },
  { function() return moe.checkpoint(5) end, "checkpoint", "function" },
  { function() return moe.nn.linear(8) end, "linear" },
  { function() return moe.nn.linear("x", 4) end, "linear", "string" },
  { function() return moe.nn.linear(8, 4, { biass = true }) end, "linear", "biass", "bias" },
  { function() return moe.nn.linear(8, 4)(ones(2, 7)) end, "linear", "[2, 7]", "8" },
  { function() return moe.nn.linear(8, 4)(5) end, "linear" },
  { function() return moe.nn.no_such_layer(8) end, "no_such_layer" },
  { function() return moe.router.topk { top_kk = 2 } end, "top_kk", "top_k" },
  { function() return moe.router.topk { top_k = 1, norm_topk_prob = true } end, "norm_topk_prob" },
  { function()
    return moe.layer { d_model = 8, num_experts = 4, router = moe.router.topk { top_k = 5 }, experts = moe.experts.mlp {
      intermediate_size = 8 } }(ones(3, 8))
  end, "top_k", "5", "4" },
  { function() return moe.optim.adamw({}, { lr = 1e-3, lrr = 1 }) end, "adamw", "lrr", "lr" },
  { function() return moe.optim.sgd { lr = -1 } end, "sgd", "lr" },
}

describe("error messages", function()
  for i, case in ipairs(CASES) do
    it(("name the function, the argument, what came and what was wanted (case %d)"):format(i), function()
      local message = helper.error_of(case[1])
      for k = 2, #case do
        assert.truthy(message:find(case[k], 1, true), ("'%s' is not in: %s"):format(case[k], message))
      end
    end)
  end

  it("begin with the caller's line", function()
    local line = debug.getinfo(1, "l").currentline + 1
    local message = helper.error_of(function() return moe.ones(4, 8):matmul(moe.ones(7, 3)) .. "" end)
    assert.truthy(message:find("errors_spec.lua:" .. line .. ":", 1, true), message)
  end)

  it("are those of the design, word for word, for a product", function()
    local message = helper.error_of(function() return ones(4, 8):matmul(ones(7, 3)) .. "" end)
    assert.truthy(message:find("matmul: inner sizes differ: a is [4, 8], b is [7, 3] (a's dim 2 = 8, b's dim 1 = 7)", 1, true), message)
  end)

  it("come as nil, message where a file is at fault", function()
    local value, message = moe.io.load "no/such/file.safetensors"
    assert.is_nil(value)
    assert.truthy(message:find("no/such/file.safetensors", 1, true))
    local ok, why = moe.io.save("no/such/folder/x.safetensors", { x = ones(2) })
    assert.truthy(ok == nil and type(why) == "string")
  end)

  it("refuse a change in place of what autograd still needs", function()
    local x = moe.ones(3, { requires_grad = true })
    local y = x:exp()
    local loss = (y * y):sum()
    y:add_(1)
    assert.truthy(helper.error_of(function() loss:backward() end):find("in place", 1, true)
      or helper.error_of(function() loss:backward() end):find("modified", 1, true)
      or helper.error_of(function() loss:backward() end):find("changed", 1, true))
  end)

  it("refuse a second backward through a freed graph", function()
    local x = moe.ones(3, { requires_grad = true })
    local loss = (x * x):sum()
    loss:backward()
    assert.truthy(helper.error_of(function() loss:backward() end):find("backward", 1, true))
  end)
end)
