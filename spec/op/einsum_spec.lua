-- einsum against the sum that its equation says, in plain loops over all letters.
local helper = require "spec.helper"
local moe = require "moe"

-- The value of every output element by brute force. Terms are lists of letters; no ellipsis.
local function brute(terms, out, tensors)
  local size, letters = {}, {}
  for i, term in ipairs(terms) do
    for d = 1, #term do
      local l = term:sub(d, d)
      if not size[l] then letters[#letters + 1] = l end
      size[l] = tensors[i].shape[d]
    end
  end
  local tables = {}
  for i, t in ipairs(tensors) do tables[i] = t:totable() end
  local function at(value, term, index)
    for d = 1, #term do value = value[index[term:sub(d, d)]] end
    return value
  end
  local function build(d, index)
    if d > #out then
      local sum = 0
      local function walk(i)
        if i > #letters then
          local p = 1
          for k, term in ipairs(terms) do p = p * at(tables[k], term, index) end
          sum = sum + p
          return
        end
        local l = letters[i]
        if out:find(l, 1, true) then return walk(i + 1) end
        for v = 1, size[l] do
          index[l] = v
          walk(i + 1)
        end
      end
      walk(1)
      return sum
    end
    local list, l = {}, out:sub(d, d)
    for v = 1, size[l] do
      index[l] = v
      list[v] = build(d + 1, index)
    end
    return list
  end
  return build(1, {})
end

local sizes = { b = 2, c = 3, i = 3, j = 4, k = 2, l = 5, h = 2, A = 2 }

describe("einsum", function()
  for _, equation in ipairs {
    "ij,jk->ik", "bij,bjk->bik", "bij,kj->bki", "ij->ji", "ij->", "ij->j", "ii->i", "ii->", "iij->ij", "i,j->ij", "i,i->", "i,i->i",
    "ij,ij->ij", "ij,ij->i", "bhik,bhjk->bhij", "ij,jk,kl->il", "ij,jk,kl->li", "ik,jk,lk->ijl", "bij,cj->bci", "bi,bij,bj->b",
    "i,ij,j->", "ij,kl->ijkl", "ij,kl->ik", "ijk,jil->kl", "A,Ai->i", "iji,j->i", "k->k", "bcij,bcij->", "ib,jb->b",
  } do
    it("computes " .. equation, function()
      local rng, terms, tensors = helper.random(#equation), {}, {}
      local left, out = equation:match "^(.-)%->(.*)$"
      for term in (left .. ","):gmatch "(.-)," do
        local shape = {}
        for d = 1, #term do shape[d] = sizes[term:sub(d, d)] end
        terms[#terms + 1] = term
        tensors[#tensors + 1] = helper.tensor(function() return rng.normal() end, shape, { dtype = "f64" })
      end
      local expected = brute(terms, out, tensors)
      assert.close(expected, moe.einsum(equation, tensors), { rtol = 1e-11, atol = 1e-11 })
      local views = {}
      for i, t in ipairs(tensors) do views[i] = helper.views(t)[1][2] end
      assert.close(expected, moe.einsum(equation:gsub(",", " , "), views), { rtol = 1e-11, atol = 1e-11 })
      moe.gradcheck(function(...) return moe.einsum(equation, { ... }) end, tensors)
    end)
  end

  it("orders the letters that occur once by the alphabet when no output is given", function()
    local a, b = moe.randn(2, 3), moe.randn(3, 4)
    assert.close(a:matmul(b):t(), moe.einsum("kj,ji", { a, b }))
    assert.close(a:t(), moe.einsum("ba", { a }))
    assert.close(a:t(), moe.einsum("aB", { a })) -- capitals come first
    assert.close(moe.randn(0):sum(), moe.einsum("ii", { moe.zeros { 0, 0 } }))
  end)

  it("takes an ellipsis for any dims, broadcast between operands", function()
    local a, b = moe.randn(2, 3, 4, 5), moe.randn(3, 5, 2)
    assert.close(a:matmul(b), moe.einsum("...ij,...jk->...ik", { a, b }))
    assert.close(a:matmul(b), moe.einsum("...ij,...jk", { a, b }))
    assert.close(a:transpose(-1, -2), moe.einsum("...ij->...ji", { a }))
    assert.close(a:permute { 3, 4, 1, 2 }, moe.einsum("...ij->ij...", { a }))
    local one = moe.randn(1, 1, 5, 2)
    assert.close(a:matmul(one), moe.einsum("...ij,...jk->...ik", { a, one }))
    assert.close(a:sum { 1, 2 }, moe.einsum("...ij->ij", { a }))
    assert.close(moe.einsum("ij,jk->ik", { a[1][1], b[1] }), moe.einsum("...ij,...jk->...ik", { a[1][1], b[1] }))
  end)

  it("gives a tensor of its own", function()
    local a = moe.ones(2, 2)
    moe.einsum("ij->ij", { a }):fill_(5)
    assert.close({ { 1, 1 }, { 1, 1 } }, a)
  end)

  it("knows empty sizes", function()
    assert.close({ { 0, 0 }, { 0, 0 } }, moe.einsum("ij,jk->ik", { moe.zeros { 2, 0 }, moe.zeros { 0, 2 } }))
    assert.same({ 0, 4, 2 }, moe.einsum("bij,bjk->bik", { moe.zeros { 0, 4, 3 }, moe.zeros { 0, 3, 2 } }).shape)
    assert.close(0, moe.einsum("i,i->", { moe.zeros { 0 }, moe.zeros { 0 } }))
  end)

  it("says what is wrong", function()
    local a, b = moe.zeros { 2, 3 }, moe.zeros { 4, 5 }
    for equation, want in pairs {
      ["ij,jk->ik"] = "'j' is 3 in one operand and 4 in operand 2, which is [4, 5]",
      ["ijk,kl->il"] = "operand 1 is [2, 3], its term \"ijk\" has 3 letters",
      ["i,kl->il"] = "operand 1 is [2, 3], its term \"i\" has 1 letters",
      ["ij,kl->im"] = "'m' of the output of \"ij,kl->im\" is in no operand",
      ["ij,kl->ii"] = "'i' of the output of \"ij,kl->ii\" is there twice",
      ["ij->ij"] = "the equation \"ij->ij\" has 1 terms for 2 tensors",
      ["ij,kl,mn->i"] = "has 3 terms for 2 tensors",
      ["i1,kl->i"] = "holds '1' where a letter was expected",
      ["ij,kl-ik"] = "has a '-' that is no \"->\"",
      ["ij,kl->ik,"] = "goes on after its output",
      ["ij,kl->ik->"] = "goes on after its output",
    } do
      local message = helper.error_of(moe.einsum, equation, { a, b })
      assert.truthy(message:find("einsum: ", 1, true) and message:find(want, 1, true), equation .. " said: " .. message)
    end
    assert.truthy(helper.error_of(moe.einsum, "ij", {}):find("takes from 1 to 16 tensors", 1, true))
  end)

  it("takes its tensors in a list or one after the other", function()
    local a, b = moe.randn(2, 3), moe.randn(3, 4)
    assert.close(moe.einsum("ij,jk->ik", { a, b }), moe.einsum("ij,jk->ik", a, b), { rtol = 0, atol = 0 })
    assert.equal(5, #moe.cat(moe.ones(2), moe.ones(3), 1))
  end)
end)
