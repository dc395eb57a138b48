local moe = require "moe"
local pictures = require "moe.recipe.pictures"
local moae = moe.recipe.moae

describe("recipe moae", function()
  local base -- trained once for the file
  local function the_base()
    base = base or pictures.pretrain { steps = 200 }
    return base
  end

  local function adapted(kind)
    local model = pictures.vit(2)
    model:load_state_dict(the_base():state_dict())
    return moae.adapt(model, kind, 4, 4)
  end

  it("is the base at the start, for both tasks and both ways of sharing", function()
    for _, kind in ipairs { "moae", "shared" } do
      local model = adapted(kind)
      for task = 1, 2 do
        local x = pictures.moving(5, task == 2)
        assert.close(the_base()(x, task), model(x, task), { rtol = 1e-5, atol = 1e-5 })
      end
    end
  end)

  it("trains adapters, gates and heads alone, as many parameters in both ways", function()
    local own, shared = adapted "moae", adapted "shared"
    for name, p in own:named_parameters() do
      local tuned = name:find "^heads" or name:find "router" or name:find "experts%.[du]"
      assert.equal(tuned ~= nil, p.requires_grad, name)
    end
    local a, b = own:num_parameters(true), shared:num_parameters(true)
    assert.is_true(math.abs(a - b) < 0.02 * a, ("%d, %d"):format(a, b))
  end)

  it("mixes the experts beside a layer by the gate of the task", function()
    moe.manual_seed(2)
    local layer = adapted("moae").blocks[1].ffn
    moe.no_grad(function() layer.experts.up_proj:normal_(0, 0.1) end)
    local x = moe.randn(3, 5, 32)
    local outputs = {}
    for task = 1, 2 do
      local g, wanted = x:linear(layer.router.tasks[task].weight):softmax(-1), layer.experts.base(x)
      for e = 1, 4 do
        local bank = layer.experts
        local h = x:linear(bank.down_proj[e], bank.down_bias[e]):relu():linear(bank.up_proj[e], bank.up_bias[e])
        wanted = wanted + h * g:narrow(3, e, 1) * 4
      end
      outputs[task] = layer(x, { task = task })
      assert.close(wanted, outputs[task], { rtol = 1e-4, atol = 1e-5 })
    end
    assert.is_true((outputs[1] - outputs[2]):abs():max():item() > 1e-4)
  end)

  it("hides the same places of all frames, and learns to fill them in", function()
    local model = pictures.vit(1)
    moe.no_grad(function()
      model.pixels.weight:fill_(0)
      model.pixels.bias:fill_(0)
    end)
    local x = pictures.moving(6, true)
    moe.manual_seed(9)
    local order = moe.randperm(4):totable()
    moe.manual_seed(9)
    local sum = 0.0
    for i = 3, 4 do -- the hidden ones; the decoder says 0
      local row, column = (order[i] - 1) // 2, (order[i] - 1) % 2
      sum = sum + x:narrow(3, row * 4 + 1, 4):narrow(4, column * 4 + 1, 4):square():mean():item() / 2
    end
    assert.close(sum, model:fill_in(x):item(), { rtol = 1e-5 })
    moe.manual_seed(3)
    local clips = pictures.moving(200, true)
    assert.is_true(the_base():fill_in(clips):item() < 0.9 * clips:square():mean():item())
  end)

  it("does better on two tasks than as many parameters that both share", function()
    local rows = moae.demo(nil, { base = the_base(), seeds = { 1, 2 }, steps = 300 })
    assert.is_true(rows[2][2] > rows[1][2], ("shared %g, experts %g"):format(rows[1][2], rows[2][2]))
    assert.is_true(rows[2][2] > 0.75)
  end)
end)
