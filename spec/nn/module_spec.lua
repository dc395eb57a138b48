-- The protocol of modules, over C layers, Lua classes and plain tables alike.
local helper = require "spec.helper" -- luacheck: ignore
local moe = require "moe"
local nn = moe.nn

local Block = nn.module "Block"

function Block:init(d)
  self.norm = nn.rmsnorm(d)
  self.up = nn.linear(d, 3)
  self.layers = { nn.linear(3, 3), nn.linear { in_features = 3, out_features = d, bias = false } }
  self.scale = moe.ones(d, { requires_grad = true })
  self:buffer("count", moe.zeros(2))
  self.width = d
end

function Block:forward(x)
  return x + self.layers[2](self.layers[1](self.up(self.norm(x)))) * self.scale
end

local function names(iterator)
  local out = {}
  for name in iterator do out[#out + 1] = name end
  return out
end

local BLOCK_NAMES = {
  "norm.weight", "up.weight", "up.bias", "layers.1.weight", "layers.1.bias", "layers.2.weight", "scale",
}

describe("a module's parts", function()
  it("come in the order of assignment, lists by number", function()
    local b = Block(4)
    assert.same(BLOCK_NAMES, names(b:named_parameters()))
    assert.equal(#BLOCK_NAMES, #b:parameters())
    assert.same({ "count" }, names(b:named_buffers()))
    assert.equal(1, #b:buffers())
    assert.equal(4 + 12 + 3 + 9 + 3 + 12 + 4, b:num_parameters())
    local list = nn.list()
    for _ = 1, 11 do list:append(nn.rmsnorm(1)) end
    local got = names(list:named_parameters())
    assert.equal("2.weight", got[2])
    assert.equal("10.weight", got[10])
  end)

  it("of a table made by setmetatable come sorted", function()
    local made = setmetatable({ b = nn.rmsnorm(2), a = nn.rmsnorm(3), 7, nn.rmsnorm(1) }, Block)
    assert.same({ "2.weight", "a.weight", "b.weight" }, names(made:named_parameters()))
    made.aa = nn.rmsnorm(5)
    assert.same({ "2.weight", "a.weight", "b.weight", "aa.weight" }, names(made:named_parameters()))
    assert.equal(1 + 3 + 2 + 5, made:num_parameters())
  end)

  it("leave out results, constants and fields that begin with _", function()
    local b = Block(4)
    b.last = b(moe.ones(1, 4))
    b.constant = moe.ones(4)
    b._hidden = nn.linear(2, 2)
    assert.same(BLOCK_NAMES, names(b:named_parameters()))
    assert.same({ "count" }, names(b:named_buffers()))
  end)

  it("that are shared count once, and stand in the state dict under each name", function()
    local a, b = nn.linear(3, 3), nn.linear(3, 3)
    b.weight = a.weight
    assert.is_true(rawequal(a.weight, b.weight))
    local both = nn.sequential { a, b, a }
    assert.equal(9 + 3 + 3, both:num_parameters())
    assert.same({ "1.weight", "1.bias", "2.bias" }, names(both:named_parameters()))
    local keys = 0
    for _ in pairs(both:state_dict()) do keys = keys + 1 end
    assert.equal(6, keys)
    local again = nn.sequential { nn.linear(3, 3), nn.linear(3, 3), nn.linear(3, 3) }
    again:load_state_dict(both:state_dict())
    assert.close(a.weight, again[2].weight)
  end)

  it("may form a cycle", function()
    local a = Block(2)
    a.layers[3] = a
    a.myself = a
    assert.equal(2 + 6 + 3 + 9 + 3 + 6 + 2, a:num_parameters())
    assert.truthy(tostring(a):find "above")
    a:eval()
    assert.is_false(a.training)
  end)

  it("are seen as children and named modules", function()
    local b = Block(4)
    assert.equal(4, #b:children())
    assert.same({ "", "norm", "up", "layers.1", "layers.2" }, names(b:named_modules()))
    assert.equal(5, #b:modules())
    local order = {}
    assert.equal(b, b:apply(function(m) order[#order + 1] = m end))
    assert.is_true(rawequal(b, order[#order]))
    assert.is_true(rawequal(b.layers[2], order[1]))
  end)

  it("set to nil and back keep their place and do not pile up", function()
    local b = Block(4)
    for _ = 1, 100 do
      b.extra = moe.ones(1)
      b.extra = nil
    end
    b.norm = nil
    assert.same({ table.unpack(BLOCK_NAMES, 2) }, names(b:named_parameters()))
    b.norm = nn.rmsnorm(4)
    assert.same(BLOCK_NAMES, names(b:named_parameters()))
    local seen = 0
    for key in pairs(b) do
      assert.equal("string", type(key))
      seen = seen + 1
    end
    assert.equal(6, seen)
  end)
end)

describe("state dicts", function()
  it("go round", function()
    moe.manual_seed(1)
    local a, b = Block(4), Block(4)
    local x = moe.randn(5, 4)
    a.count:fill_(7)
    assert.is_not.same(a(x):totable(), b(x):totable())
    local report = b:load_state_dict(a:state_dict())
    assert.same({ missing = {}, unexpected = {} }, report)
    assert.same(a(x):totable(), b(x):totable())
    assert.same({ 7, 7 }, b.count:totable())
  end)

  it("share storage and have no history", function()
    local a = nn.linear(2, 2)
    local state = a:state_dict()
    assert.is_false(state.weight.requires_grad)
    state.weight:fill_(3)
    assert.same({ { 3, 3 }, { 3, 3 } }, a.weight:totable())
  end)

  it("are refused whole, with every fault in one message", function()
    local b = Block(4)
    local before = b.scale:totable()
    local state = b:state_dict()
    for name, t in pairs(state) do state[name] = t:clone() + 1 end
    state["norm.weight"], state["up.bias"] = nil, nil
    state["layers.1.weight"] = moe.ones(3, 4)
    state.count = "seven"
    state.zzz, state.aaa = moe.ones(1), moe.ones(1)
    local ok, message = pcall(b.load_state_dict, b, state)
    assert.is_false(ok)
    assert.equal("load_state_dict: 2 missing: norm.weight, up.bias; 2 unexpected: aaa, zzz; "
      .. "2 of another shape: layers.1.weight ([3, 3] here, [3, 4] there), count ([2] here, a string there)",
      (message:gsub("^.-:%d+: ", "")))
    assert.same(before, b.scale:totable())
  end)

  it("may be partial when not strict", function()
    local b = Block(4)
    local report = b:load_state_dict({ scale = moe.full({ 4 }, 9), other = moe.ones(1) }, { strict = false })
    assert.same({ "other" }, report.unexpected)
    assert.equal(7, #report.missing)
    assert.same({ 9, 9, 9, 9 }, b.scale:totable())
    assert.is_true(b.scale.requires_grad)
    assert.has_error(function() b:load_state_dict({ scale = moe.ones(5) }, { strict = false }) end)
    assert.has_error(function() b:load_state_dict({}, { strickt = false }) end)
    assert.has_error(function() b:load_state_dict(3) end)
  end)

  it("convert types", function()
    local a = nn.linear(3, 2):to "f64"
    local b = nn.linear(3, 2)
    a:load_state_dict(b:state_dict())
    assert.equal("f64", a.weight.dtype)
    assert.same(b.weight:totable(), a.weight:totable())
  end)
end)

describe("modes", function()
  it("reach the whole tree", function()
    local drop = nn.dropout(0.5)
    local m = nn.sequential { nn.linear(2, 2), nn.dict { inner = nn.residual(drop) } }
    assert.is_true(drop.training)
    assert.equal(m, m:eval())
    assert.is_false(drop.training)
    assert.is_false(m[2].inner.training)
    m:train()
    assert.is_true(drop.training)
    m:train(false)
    assert.is_false(m.training)
    drop.training = true
    assert.is_true(drop.training)
    assert.has_error(function() drop.training = 1 end)
  end)

  it("freeze stops gradients and stays in the state dict", function()
    local b = Block(4)
    b.norm:freeze()
    b(moe.ones(2, 4)):sum():backward()
    assert.is_nil(b.norm.weight.grad)
    assert.truthy(b.up.weight.grad)
    assert.equal(b:num_parameters() - 4, b:num_parameters(true))
    assert.truthy(b:state_dict()["norm.weight"])
    b:freeze()
    assert.equal(0, b:num_parameters(true))
    assert.same(BLOCK_NAMES, names(b:named_parameters()))
    assert.is_nil(b.up.weight.grad)
    b:unfreeze()
    assert.equal(b:num_parameters(), b:num_parameters(true))
    b(moe.ones(2, 4)):sum():backward()
    assert.truthy(b.norm.weight.grad)
    assert.truthy(b.scale.grad)
    b:zero_grad()
    for _, p in b:named_parameters() do assert.is_nil(p.grad) end
  end)
end)

describe("to", function()
  it("converts in place, gradients too, and keeps shared tensors shared", function()
    local b = Block(4)
    local weight, scale = b.up.weight, b.scale
    b(moe.ones(2, 4)):sum():backward()
    local values, gradient = weight:totable(), scale.grad:totable()
    assert.equal(b, b:to "f64")
    assert.is_true(rawequal(weight, b.up.weight))
    assert.equal("f64", weight.dtype)
    assert.equal("f64", b.up.dtype)
    assert.equal("f64", b.scale.dtype)
    assert.equal("f64", b.count.dtype)
    assert.equal("f64", scale.grad.dtype)
    assert.same(values, weight:totable())
    assert.same(gradient, scale.grad:totable())
    assert.equal("f64", b(moe.ones(2, 4, { dtype = "f64" })).dtype)
    b:to { dtype = "bf16", device = "cpu" }
    assert.equal("bf16", weight.dtype)
    b:to("f32", "cpu")
    assert.equal("f32", b.norm.weight.dtype)
    assert.is_true(weight.requires_grad)
  end)

  it("leaves integers alone and refuses other targets", function()
    local b = Block(4)
    b:buffer("steps", moe.zeros(1, { dtype = "i64" }))
    b:to "bf16"
    assert.equal("i64", b.steps.dtype)
    assert.has_error(function() b:to "i64" end)
    assert.has_error(function() b:to "toaster" end)
    assert.has_error(function() b:to(3) end)
  end)

  it("between forward and backward is noticed", function()
    local m = nn.linear(2, 2)
    local x = moe.ones(3, 2, { requires_grad = true })
    local y = m(x):sum()
    m:to "f64"
    assert.has_error(function() y:backward() end)
  end)
end)

describe("classes", function()
  it("inherit", function()
    local Wide = nn.module("Wide", Block)
    function Wide:init(d)
      Block.init(self, d)
      self.extra_norm = nn.rmsnorm(d)
    end
    local w = Wide(4)
    assert.equal(8, #w:parameters())
    assert.truthy(tostring(w):find "^Wide 51 parameters")
    assert.same({ 2, 4 }, w(moe.ones(2, 4)).shape)
  end)

  it("show methods to completers and fields to pairs", function()
    assert.equal("function", type(getmetatable(nn.linear(2, 2)).parameters))
    assert.equal("function", type(getmetatable(nn.linear(2, 2)).__index.state_dict))
    assert.equal(Block, getmetatable(Block(2)))
    assert.equal("class Block", tostring(Block))
  end)

  it("without forward say so", function()
    local Empty = nn.module "Empty"
    assert.error_matches(function() Empty()(1) end, "Empty: this module has no forward")
    assert.has_error(function() nn.module() end)
    assert.has_error(function() nn.module("A", {}) end)
  end)

  it("take parameters made explicitly", function()
    local m = nn.module "M"()
    m.w = nn.parameter(moe.ones(2))
    m.v = nn.parameter(moe.ones(2), { decay = false })
    assert.is_true(m.w.requires_grad)
    assert.equal(4, m:num_parameters())
    assert.is_true(nn.decays(m.w))
    assert.is_false(nn.decays(m.v))
    assert.is_false(nn.decays(nn.linear(2, 2).bias))
    assert.is_true(nn.decays(nn.linear(2, 2).weight))
    assert.is_false(nn.decays(nn.rmsnorm(2).weight))
    assert.has_error(function() nn.parameter(m.w * 2) end)
    assert.has_error(function() nn.parameter(3) end)
    assert.has_error(function() m:buffer("x", 3) end)
  end)

  it("print as a tree", function()
    assert.equal("Block 47 parameters\n  norm: rmsnorm(4) 4 parameters\n  up: linear(4 -> 3, bias) 15 parameters\n"
      .. "  layers.1: linear(3 -> 3, bias) 12 parameters\n  layers.2: linear(3 -> 4) 12 parameters\n"
      .. "  scale: parameter f32 [4]\n  count: buffer f32 [2]", tostring(Block(4)))
    local deep = nn.sequential { Block(4), Block(4), nn.relu() }
    assert.truthy(tostring(deep):find("\n  1-2: 2 x Block 47 parameters\n    norm: ", 1, true))
    assert.truthy(tostring(nn.linear(1000, 1000)):find "1001000 parameters")
  end)
end)

describe("memory of modules", function()
  local function live()
    collectgarbage()
    collectgarbage()
    return moe.memory().live
  end

  it("comes back when a module holds a closure that holds it", function()
    local before = live()
    for _ = 1, 5 do
      local m = Block(64)
      m.closure = function() return m end
      m.layers[2].weight:register_hook(function(g) return m and g end)
      m(moe.ones(1, 64)):sum():backward()
    end
    assert.equal(before, live())
  end)

  it("of C layers is held by their weights alone", function()
    local before = live()
    local weight = nn.linear(100, 100).weight
    assert.truthy(live() >= before + 40000)
    assert.close(100, weight:sum(2).shape[1])
    weight = nil -- luacheck: ignore
    assert.equal(before, live())
  end)

  -- Every allocation of tensor memory fails in turn.
  for name, work in pairs {
    attention = function()
      local m = nn.attention { d_model = 8, num_heads = 4, num_kv_heads = 2, rope = true, qk_norm = true, dropout = 0.3 }
      local x = moe.ones(1, 3, 8, { requires_grad = true })
      local _, state = m(x, m:state(1))
      m(x, state):sum():backward()
      m(x, nil, { cu_seqlens = moe.tensor({ 0, 2, 3 }, { dtype = "i64" }) }):sum():backward()
    end,
    conversion = function()
      local m = nn.ffn { d_model = 4, activation = "swiglu" }
      m(moe.ones(2, 4)):sum():backward()
      m:to "f64"
      m:load_state_dict(nn.ffn { d_model = 4, activation = "swiglu" }:state_dict())
      nn.init.orthogonal_(m.down_proj.weight:detach())
    end,
    convolutions = function()
      nn.conv1d { in_channels = 2, out_channels = 2, kernel_size = 3, causal = true }(moe.ones(1, 2, 5)):sum():backward()
      local m = nn.causal_conv1d(3)
      m(moe.ones(1, 1, 3), m:state(1))
    end,
  } do
    it("is not lost when it runs out: " .. name, function()
      work()
      local before, n, failures = live(), 0, 0
      repeat
        n = n + 1
        moe.core.fail_after(n)
        local ok, message = pcall(work)
        moe.core.fail_after(0)
        if not ok then
          failures = failures + 1
          assert.truthy(tostring(message):find "memory")
        end
      until ok
      assert.truthy(failures > 10)
      assert.equal(before, live())
    end)
  end
end)
