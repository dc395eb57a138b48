local moe = require "moe"
local lab = require "moe.recipe.lab"
local recipe = require "moe.recipe.mohd"

local EXACT = { rtol = 1e-5, atol = 1e-6 }

-- A sliced layer's weight as the dense one's [out, in].
local function whole(sliced)
  local w = sliced.weight:detach()
  if sliced._options.side == "out" then return w:reshape { -1, w:size(3) } end
  return w:permute { 2, 1, 3 }:reshape { w:size(2), -1 }
end

describe("MoHD", function()
  it("with all groups on is the dense model, forward and backward", function()
    moe.manual_seed(1)
    local sizes = { vocab_size = 11, d_model = 4, num_layers = 2, num_heads = 2, max_seq_len = 6 }
    local model = recipe.model(setmetatable({ expand = 3, groups = 6, active = 6, hidden = 10 }, { __index = sizes }))
    local dense = moe.model.lm { vocab_size = 11, d_model = 12, num_layers = 2, num_heads = 2, max_seq_len = 6, ffn_hidden = 10 }
    local state = model:state_dict()
    for i, block in ipairs(model.layers) do
      local mixer, ffn, at = block.mixer.part.experts, block.ffn.experts, "layers." .. i .. "."
      state[at .. "mixer.qkv_proj.weight"], state[at .. "mixer.o_proj.weight"] = whole(mixer.read), whole(mixer.write)
      state[at .. "ffn.up_proj.weight"], state[at .. "ffn.down_proj.weight"] = whole(ffn.read), whole(ffn.write)
    end
    assert.same({}, dense:load_state_dict(state, { strict = false }).missing)
    local ids = moe.randint(1, 11, { 2, 6 })
    local y, want = model(ids), dense(ids)
    assert.close(want, y, EXACT)
    y:square():sum():backward()
    want:square():sum():backward()
    assert.close(dense.embed.weight.grad, model.embed.weight.grad, { rtol = 1e-4, atol = 1e-4 })
    local up = dense.layers[1].ffn:parameters()[1].grad
    assert.close(up:reshape { 10, 6, 2 }:permute { 2, 1, 3 }, model.layers[1].ffn.experts.read.weight.grad, { rtol = 1e-4, atol = 1e-4 })
  end)

  it("reads and writes the active groups alone: the masked products, scaled", function()
    moe.manual_seed(2)
    local o = { d_model = 12, num_layers = 2, groups = 6, active = 3, shared = 1, hidden = 5 }
    local layer, x = recipe.ffn(o), moe.randn(2, 4, 12)
    local y, routing = layer(x)
    assert.equal(8 * 3, routing.num_assignments)
    assert.equal(8, routing:load():totable()[1]) -- the shared group
    local mask = moe.zeros(8, 6)
    for a, t in ipairs(routing.token:totable()) do mask[t][routing.expert:totable()[a]] = 1 end
    mask = mask:repeat_interleave(2, 2)
    local part = layer.experts
    local h = (x:reshape { 8, 12 } * mask):linear(whole(part.read)) * 2 -- 6 groups, 3 of them active
    local want = h:gelu():linear(whole(part.write)) * mask
    assert.close(want:reshape { 2, 4, 12 }, y, EXACT)
    ;(y:sum() + routing:aux()):backward()
    assert.is_true(layer.router.best.weight.grad:abs():sum():item() > 0)
    moe.no_grad(function() part.fusion:copy_(moe.randn(6, 6)) end)
    assert.close(part.fusion:matmul(want:reshape { 8, 6, 2 }):reshape { 2, 4, 12 }, (layer(x)), { rtol = 1e-4, atol = 1e-5 })
  end)

  it("keeps masked tokens out", function()
    moe.manual_seed(3)
    local layer = recipe.ffn { d_model = 12, num_layers = 2, groups = 6, active = 3, shared = 1, hidden = 5 }
    local y, routing = layer(moe.randn(1, 4, 12), { mask = moe.tensor { { 1, 1, 0, 1 } }:ne(0) })
    assert.equal(9, routing.num_assignments)
    assert.close(moe.zeros(12), y[1][3])
  end)

  it("three times as wide at the same active width beats the narrow model, and scaling helps", function()
    local sizes = { d_model = 32, num_heads = 4, steps = 100, eval_steps = 10 }
    local function run(model) return lab.train({ title = "", model = model }, sizes).val_loss end
    local narrow = run(function(o)
      return moe.model.lm { vocab_size = o.vocab_size, d_model = 32, num_layers = 2, num_heads = 4, max_seq_len = o.max_seq_len }
    end)
    local mohd = run(recipe.model)
    local plain = run(function(o) return recipe.model(setmetatable({ scaling = false }, { __index = o })) end)
    if os.getenv "MOE_SHOW" then print(narrow, mohd, plain) end
    assert.is_true(mohd < 0.92 * narrow, mohd)
    assert.is_true(mohd < plain, plain)
  end)
end)
