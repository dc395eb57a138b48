-- Row-sparse gradients: the same numbers as dense ones, kept as the touched rows.
local helper = require "spec.helper"
local moe = require "moe"

local function i64(list) return moe.tensor(list, { dtype = "i64" }) end

local function leaf(n, d, dtype)
  moe.manual_seed(3)
  return moe.randn(n, d, { dtype = dtype or "f32", requires_grad = true })
end

-- The gradient of a weighted sum of embeddings, so that every position counts differently.
local function embed(w, ids, sparse, scale)
  local y = moe.embedding(w, i64(ids), { sparse = sparse })
  local c = moe.arange(1, y:numel(), { dtype = "f64" }):sin():to(w.dtype):reshape(y.shape)
  return (y * c):sum() * (scale or 1)
end

describe("row-sparse gradients", function()
  it("list the rows that were read, sorted, once each, and read as the dense gradient", function()
    local a, b = leaf(9, 4), leaf(9, 4)
    embed(a, { 7, 2, 7, 9, 2, 2 }, true):backward()
    embed(b, { 7, 2, 7, 9, 2, 2 }, false):backward()
    assert.same({ 2, 7, 9 }, a.grad_rows:totable())
    assert.same({ 3, 4 }, a.grad_values.shape)
    assert.same(b.grad:totable(), a.grad:totable())
    assert.is_nil(b.grad_rows)
    assert.is_nil(b.grad_values)
    a.grad_rows:fill_(1000) -- a copy
    assert.same({ 2, 7, 9 }, a.grad_rows:totable())
    assert.same(b.grad:totable(), a.grad:totable())
  end)

  it("of many rows among very many are those of the dense path to the bit, for any number of threads", function()
    local ids = moe.randint(1, 50000, 3, 2000)
    local before, got = moe.threads(), {}
    local c = moe.randn(3, 2000, 8)
    for run, threads in ipairs { 1, 3, 1 } do
      moe.threads(threads)
      local w = moe.zeros({ 50000, 8 }, { requires_grad = true });
      (moe.embedding(w, ids, { sparse = run < 3 }) * c):sum():backward()
      got[run] = { w.grad, w.grad_rows }
    end
    moe.threads(before)
    assert.is_true(got[1][1]:eq(got[3][1]):all():item())
    assert.same(got[1][1]:sum(2):totable(), got[2][1]:sum(2):totable())
    local rows = got[1][2]:totable()
    for i = 2, #rows do assert.is_true(rows[i] > rows[i - 1]) end
    assert.is_nil(got[3][2])
  end)

  it("accumulate: rows to rows, rows to dense, dense to rows", function()
    local first, second = { 3, 1, 3 }, { 5, 3 }
    local want = leaf(6, 3, "f64")
    embed(want, first, false):backward()
    embed(want, second, false, 2):backward()
    local w = leaf(6, 3, "f64")
    embed(w, first, true):backward()
    embed(w, second, true, 2):backward()
    assert.same({ 1, 3, 5 }, w.grad_rows:totable())
    assert.close(want.grad, w.grad, { rtol = 1e-15 })
    for _, order in ipairs { { true, false }, { false, true } } do
      local v = leaf(6, 3, "f64")
      embed(v, first, order[1]):backward()
      embed(v, second, order[2], 2):backward()
      assert.is_nil(v.grad_rows)
      assert.close(want.grad, v.grad, { rtol = 1e-15 })
    end
    local tied = leaf(6, 3, "f64") -- read twice in one graph, once densely: a tied head
    local want_tied = leaf(6, 3, "f64");
    (embed(tied, first, true) + tied:sum()):backward();
    (embed(want_tied, first, false) + want_tied:sum()):backward()
    assert.is_nil(tied.grad_rows)
    assert.close(want_tied.grad, tied.grad, { rtol = 1e-15 })
  end)

  it("leave the padding row out, and are empty where nothing was read", function()
    local w = leaf(5, 2)
    moe.embedding(w, i64 { 4, 1, 4 }, 4, true):sum():backward()
    assert.same({ 1 }, w.grad_rows:totable())
    local v = leaf(5, 2)
    local opt = moe.optim.adamw(v, { lr = 0.1 })
    local before = v:detach():clone()
    moe.embedding(v, moe.zeros({ 0 }, { dtype = "i64" }), { sparse = true }):sum():backward()
    assert.same({ 0, 2 }, v.grad_values.shape)
    assert.equal(0, opt:step { clip = 1 })
    assert.same(before:totable(), v:totable())
  end)

  it("become dense where a tensor is wanted: moe.grad, hooks, results of calls, second derivatives", function()
    local w = leaf(6, 3, "f64")
    assert.same({ 6, 3 }, moe.grad(embed(w, { 2, 2 }, true), w).shape)
    local seen
    local id = w:register_hook(function(g)
      seen = g.shape
      return g * 2
    end)
    embed(w, { 2, 2 }, true):backward()
    assert.same({ 6, 3 }, seen)
    assert.is_nil(w.grad_rows)
    w:remove_hook(id)
    w.grad = nil
    embed(w * 2, { 2, 5 }, true):backward() -- not a leaf
    assert.is_nil(w.grad_rows)
    assert.close(moe.grad(embed(w * 2, { 2, 5 }, false), w), w.grad, { rtol = 1e-15 })
    w.grad = nil -- the gradient of |g|^2, g = 3 n x^2 for a row x that is read n times, is 36 n^2 x^3
    local g = moe.grad(moe.embedding(w, i64 { 1, 3, 3 }, { sparse = true }):pow(3):sum(), w, { create_graph = true });
    (g * g):sum():backward()
    local times = moe.tensor({ { 1 }, { 0 }, { 4 }, { 0 }, { 0 }, { 0 } }, { dtype = "f64" })
    assert.close(36 * times * w:detach():pow(3), w.grad, { rtol = 1e-12 })
  end)

  it("in bf16 are sums in f32, rounded once", function()
    local w = moe.zeros({ 4, 1 }, { dtype = "bf16", requires_grad = true })
    local y = moe.embedding(w, moe.full({ 300 }, 2, { dtype = "i64" }), { sparse = true })
    y:backward(moe.full({ 300, 1 }, 1, { dtype = "bf16" }))
    assert.equal("bf16", w.grad_values.dtype)
    assert.equal(300, w.grad_values:item())
  end)

  it("follow their leaf to another type", function()
    local m = moe.nn.embedding { num_embeddings = 5, embedding_dim = 2, sparse = true }
    m(i64 { 3, 3 }):sum():backward()
    m:to "f64"
    assert.equal("f64", m.weight.grad_values.dtype)
    assert.same({ { 0, 0 }, { 0, 0 }, { 2, 2 }, { 0, 0 }, { 0, 0 } }, m.weight.grad:totable())
  end)
end)

describe("optimizers on row-sparse gradients", function()
  local kinds = {
    { "adamw", { lr = 0.1, weight_decay = 0.3 } },
    { "sgd", { lr = 0.1 } },
    { "sgd", { lr = 0.1, momentum = 0.9, nesterov = true, weight_decay = 0.1 } },
  }
  for _, case in ipairs(kinds) do
    local kind, options = case[1], case[2]
    -- The oracle: the rows that are read are a parameter of their own, stepped only when they are.
    it(kind .. " moves the touched rows alone, and their state " .. (options.momentum or ""), function()
      for _, dtype in ipairs { "f32", "f64" } do
        local w = leaf(7, 5, dtype)
        local start = w:detach():clone()
        local opt = moe.optim[kind](w, options)
        local dense = leaf(7, 5, dtype)
        local all = moe.optim[kind](dense, options)
        for _ = 1, 3 do -- every row is read: the dense update
          for o, v in pairs { [opt] = w, [all] = dense } do
            o:zero_grad()
            embed(v, { 1, 2, 3, 4, 5, 6, 7, 3 }, v == w):backward()
            o:step()
          end
        end
        assert.same(dense:totable(), w:totable())
        local before, state = w:detach():clone(), {}
        for name, t in pairs(opt:state_dict()) do state[name] = t:clone() end
        opt:zero_grad()
        embed(w, { 6, 2, 6 }, true):backward()
        opt:step()
        all:zero_grad()
        embed(dense, { 6, 2, 6 }, false):backward()
        all:step()
        for row = 1, 7 do
          local touched = row == 2 or row == 6
          assert.equal(not touched, w:detach()[row]:eq(before[row]):all():item())
          if touched then assert.same(dense[row]:totable(), w[row]:totable()) end
          for name, t in pairs(opt:state_dict()) do
            if not name:find "step$" then
              assert.same(touched and all:state_dict()[name][row]:totable() or state[name][row]:totable(), t[row]:totable())
            end
          end
        end
        assert.is_false(w:detach():eq(start):all():item())
      end
    end)
  end

  it("follow PyTorch's SparseAdam and SGD on a sparse embedding", function()
    for _, case in ipairs(helper.fixture "sparse") do
      local start = {}
      for r = 0, 11 do start[r + 1] = { math.cos(3 * r), math.cos(3 * r + 1), math.cos(3 * r + 2) } end
      local w = moe.tensor(start, { dtype = "f64", requires_grad = true })
      case.options.weight_decay = 0
      local opt = moe.optim[case.kind](w, case.options)
      for s = 1, 6 do
        local ids, factor = {}, {}
        for i = 1, 5 do
          ids[i] = (s * i * i + 3 * i) % 12 + 1
          factor[i] = { math.sin(s + i), math.sin(s + i + 1), math.sin(s + i + 2) }
        end
        opt:zero_grad();
        (moe.embedding(w, i64(ids), { sparse = true }) * moe.tensor(factor, { dtype = "f64" })):sum():backward()
        opt:step()
      end
      assert.close(case.last, w, { rtol = 1e-11, atol = 1e-13 })
    end
  end)

  it("as PyTorch's SparseAdam, whose step count is the parameter's", function()
    -- one row, read in steps 1 and 3: m and v stand still in step 2, the bias correction does not
    local w = moe.tensor({ { 1.0 }, { 2.0 } }, { dtype = "f64", requires_grad = true })
    local opt = moe.optim.adamw(w, { lr = 0.1, weight_decay = 0 })
    local m, v, p = 0, 0, 1.0
    for step, row in ipairs { 1, 2, 1 } do
      opt:zero_grad();
      (moe.embedding(w, i64 { row }, { sparse = true }) * 0.5):sum():backward()
      opt:step()
      if row == 1 then
        m, v = m + (0.5 - m) * 0.1, v * 0.999 + 0.25 * 0.001
        p = p - 0.1 / (1 - 0.9 ^ step) * m / (math.sqrt(v) / math.sqrt(1 - 0.999 ^ step) + 1e-8)
      end
    end
    assert.close(p, w[1][1], { rtol = 1e-12 })
  end)

  it("clips by the norm of what was touched, in place", function()
    local w = leaf(100, 2, "f64")
    moe.embedding(w, i64 { 9, 9, 40 }, { sparse = true }):sum():backward()
    local norm = math.sqrt(2 * (2 ^ 2 + 1))
    assert.close(norm, moe.optim.clip_grad_norm({ w }, 1), { rtol = 1e-14 })
    assert.same({ 9, 40 }, w.grad_rows:totable())
    assert.close({ { 2 / norm, 2 / norm }, { 1 / norm, 1 / norm } }, w.grad_values, { rtol = 1e-5 })
    w.grad = nil
    assert.is_nil(w.grad_rows)
  end)

  it("keeps the master copy of a bf16 table", function()
    local w = moe.ones({ 6, 2 }, { dtype = "bf16", requires_grad = true })
    local opt = moe.optim.sgd(w, { lr = 2 ^ -11 })
    for _ = 1, 16 do
      opt:zero_grad()
      moe.embedding(w, i64 { 4 }, { sparse = true }):sum():backward()
      opt:step()
    end
    assert.same({ 1 - 2 ^ -7, 1 - 2 ^ -7 }, w[4]:to("f32"):totable())
    assert.same({ 1, 1 }, w[5]:to("f32"):totable())
  end)

  it("trains, accumulates and resumes to the bit", function()
    local dir = os.tmpname()
    os.remove(dir)
    local function make()
      moe.manual_seed(5)
      local model = moe.nn.sequential(moe.nn.embedding { num_embeddings = 500, embedding_dim = 6, sparse = true }, moe.nn.linear(6, 3))
      local n = 0
      local trainer = moe.trainer {
        model = model, optimizer = moe.optim.adamw { lr = 0.05 }, clip = 0.5, accumulate = 2, quiet = true,
        loss = function(m, batch) return moe.loss.cross_entropy(m(batch.x), batch.y) end,
        checkpoint = { dir = dir, every = 3, keep = 1 },
      }
      local batches = {}
      for i = 1, 4 do
        batches[i] = { x = i64 { 1 + i * 7, 2 + i, 499 }, y = i64 { 1, 2, 3 } }
        n = n + 1
      end
      return trainer, batches, model
    end
    local trainer, batches, model = make()
    trainer:fit(batches, { steps = 6 })
    local whole = model[1].weight:totable()
    trainer, batches = make()
    trainer:fit(batches, { steps = 3 })
    trainer, batches, model = make()
    assert.equal(3, trainer:resume())
    trainer:fit(batches, { steps = 6 })
    assert.same(whole, model[1].weight:totable())
    for _, name in ipairs(moe.io.list(dir)) do moe.io.remove(dir .. "/" .. name) end
    moe.io.remove(dir)
  end)

  it("names a non-finite gradient's parameter", function()
    local model = moe.nn.sequential(moe.nn.embedding { num_embeddings = 9, embedding_dim = 2, sparse = true })
    local trainer = moe.trainer {
      model = model, optimizer = moe.optim.sgd { lr = 1 }, quiet = true,
      loss = function(m) return (m(i64 { 3 }) * 0):sqrt():sum() end,
    }
    local ok, err = pcall(trainer.fit, trainer, { {} }, { steps = 1 })
    assert.is_false(ok)
    assert.matches("gradient.*1%.weight", tostring(err))
  end)
end)

