local moe = require "moe"
local helper = require "spec.helper"

local function by_id(o)
  o.d_model, o.num_experts = 4, 5
  moe.manual_seed(4)
  return moe.router.by_id(o)
end

local function ints(t) return moe.tensor(t, { dtype = "i64" }) end

describe("moe.router.by_id", function()
  it("looks experts up, one or several an id", function()
    local router = by_id { key = "domain_ids", table = { 3, { 1, 2, 5 }, { 4 } } }
    local routing = router:route(moe.randn(4, 4), { domain_ids = ints { 2, 1, 3, 2 } })
    assert.same({ { 1, 2, 5 }, { 3, 0, 0 }, { 4, 0, 0 }, { 1, 2, 5 } }, routing.index:totable())
    local sums = moe.zeros(4):index_add(1, routing.token, routing.weight)
    assert.close(moe.ones(4), sums, { rtol = 1e-6 })
    assert.close(1 / 3, routing.weight:min(), { rtol = 1e-6 })
    local same = by_id { key = "domain_ids", table = ints { { 3, 0, 0 }, { 1, 2, 5 }, { 4, 0, 0 } } }
    assert.same(router.table:totable(), same.table:totable())
  end)

  it("takes an id a token, a sequence, or one for all", function()
    local layer = moe.layer {
      d_model = 4, num_experts = 3, router = moe.router.by_id { table = { 1, 2, 3 } }, experts = moe.experts.mlp { intermediate_size = 2 },
    }
    local x = moe.randn(2, 3, 4)
    local function experts(task_ids)
      local _, routing = layer(x, { task_ids = task_ids })
      return routing.index:reshape { -1 }:totable()
    end
    assert.same({ 1, 2, 3, 3, 2, 1 }, experts(ints { { 1, 2, 3 }, { 3, 2, 1 } }))
    assert.same({ 3, 3, 3, 1, 1, 1 }, experts(ints { 3, 1 }))
    assert.same({ 2, 2, 2, 2, 2, 2 }, experts(2))
    assert.same({ 3, 3, 3, 1, 1, 1 }, experts(moe.tensor({ 3, 1 }, { dtype = "u8" })))
    local _, routing = layer(x, { task_ids = ints { 0, 1 }, mask = moe.tensor { { 0, 0, 0 }, { 1, 1, 1 } }:gt(0) })
    assert.same({ 3, 0, 0 }, routing:load():totable())
  end)

  it("learns gates by id", function()
    local router = by_id { num_ids = 3, score = "sigmoid", dtype = "f64" }
    local ids = ints { 2, 2, 1, 1 }
    local routing = router:route(moe.randn(4, 4, { dtype = "f64" }), { task_ids = ids })
    local logits = router.weight:index_select(1, ids)
    local weight, index = moe.router_topk(logits, { top_k = 2, score = "sigmoid", norm_topk_prob = true })
    assert.same(index:totable(), routing.index:totable())
    assert.close(logits, routing.logits)
    local w = moe.randn(8, { dtype = "f64" });
    (routing.weight * w):sum():backward()
    assert.equal(0, router.weight.grad[3]:abs():max():item()) -- an id that did not come
    assert.is_true(router.weight.grad[1]:abs():max():item() > 0)
    local again = router.weight.grad
    router.weight.grad = nil
    local at = routing.source;
    (weight:reshape { -1 }:index_select(1, at) * w):sum():backward()
    assert.close(router.weight.grad, again, { rtol = 1e-10, atol = 1e-12 })
    -- all experts of a task, mixed: a dense gate a task
    local dense = by_id { num_ids = 3, top_k = 5 }
    assert.close(dense.weight[2]:softmax(-1), dense:route(moe.randn(1, 4), { task_ids = 2 }).weight, { rtol = 1e-5 })
  end)

  it("leaves experts out by ctx.expert_mask", function()
    local router = by_id { num_ids = 2, top_k = 1 }
    local _, best = router.weight[1]:max(1)
    local open = moe.arange(1, 5):ne(best:item())
    local routing = router:route(moe.randn(1, 4), { task_ids = 1, expert_mask = open })
    assert.is_true(routing.expert:item() ~= best:item())
  end)

  it("names what is wrong", function()
    local function says(message, f) assert.matches(message, helper.error_of(f)) end
    says("wants a 'table' of experts, or 'num_ids'", function() by_id {} end)
    says("exclude each other", function() by_id { table = { 1 }, num_ids = 2 } end)
    says("the table names expert 6, wanted 1 to 5", function() by_id { table = { 6 } } end)
    says("the table has x for id 2", function() by_id { table = { 1, "x" } } end)
    says("the table is a f32 tensor", function() by_id { table = moe.ones(3) } end)
    says("'num_ids' must be at least 1", function() by_id { num_ids = 0 } end)
    local router, x = by_id { num_ids = 2 }, moe.randn(4, 4)
    says("ctx.task_ids is a nil, wanted a tensor of integers, one a token %(4%)", function() router:route(x, {}) end)
    says("ctx.task_ids is of f32", function() router:route(x, { task_ids = moe.ones(4) }) end)
    says("ctx.task_ids is %[3%], wanted one a token %(4%) or one a sequence %(2%)", function()
      router:route(x, { task_ids = ints { 1, 1, 1 }, shape = { 2, 2 } })
    end)
    says("ctx.task_ids has the id 3, wanted 1 to 2", function() router:route(x, { task_ids = ints { 1, 1, 3, 1 } }) end)
    says("ctx.task_ids has the id 0", function() router:route(x, { task_ids = 0 }) end)
    says("description without weights", function() moe.router.by_id { num_ids = 2 }:route(x, { task_ids = 1 }) end)
  end)
end)
