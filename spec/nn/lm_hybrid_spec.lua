-- Language models of any mixers: patterns, options by kind, norm and residual placement; whole = pieces = step by step = packed.
require "spec.helper"
local moe = require "moe"
local nn = moe.nn
local lm = moe.model.lm

local KINDS <const> = {
  attention = {}, mamba = { d_state = 4 }, mamba2 = { d_state = 4, headdim = 8 }, retention = {}, gla = {}, delta = {}, gated_delta = {},
  kda = {}, lightning = {}, based = { feature_dim = 2 }, rwkv7 = {}, mla = { kv_lora_rank = 4 }, stick_breaking = {},
  mixture_of_heads = { top_k = 1 },
}

local function merge(...)
  local out = {}
  for _, t in ipairs { ... } do
    for k, v in pairs(t) do out[k] = v end
  end
  return out
end

local SMALL <const> = { vocab_size = 11, d_model = 16, num_heads = 2, num_layers = 3, max_seq_len = 64, intermediate_size = 16 }

local function build(options)
  moe.manual_seed(3)
  return lm(merge(SMALL, options)):to("f64"):eval()
end

local function ids_of(...) return moe.tensor({ ... }, { dtype = "i64" }) end
local A <const> = { 1, 5, 3, 11, 2, 2, 7, 9, 4 }
local B <const> = { 9, 9, 1, 4, 6, 8, 10, 3, 5 }

local function agrees(m)
  local ids = ids_of(A, B)
  local whole = m(ids)
  for _, sizes in ipairs { { 9 }, { 4, 1, 0, 3, 1 }, { 1, 1, 1, 1, 1, 1, 1, 1, 1 } } do
    local state, parts, start = m:state(2), {}, 1
    for i, n in ipairs(sizes) do
      parts[i], state = m(ids:narrow(2, start, n), nil, state)
      start = start + n
    end
    assert.equal(9, state.position)
    assert.close(whole, moe.cat(parts, 2), { rtol = 1e-8, atol = 1e-9 })
  end
end

local Scale = nn.module "scale"
function Scale:init(by) self._by = by end
function Scale:forward(x) return x * self._by end

describe("lm of any mixers", function()
  local hybrids = {
    jamba = { layer_types = { "mamba", "attention", "mamba" }, ffn = { "dense", "moe" }, moe = { num_experts = 4, top_k = 2 } },
    nemotron = { layer_types = { "mamba2", "none", "attention" }, ffn = { "none", "dense", "none" },
      mixers = { mamba2 = KINDS.mamba2 } },
    rwkv = { layer_types = { "gated_delta", "rwkv7", "rwkv7" }, norm_placement = "sandwich", norm = "rmsnorm" },
    parallel = { layer_types = { "retention", "attention" }, positional = "rope", residual = "parallel" },
    post = { layer_types = { "kda", "gla", "lightning" }, norm_placement = "post" },
    pattern_of_two = { layer_types = { "based", "delta" }, num_layers = 5, residual = "parallel", norm_placement = "sandwich" },
  }
  for name, options in pairs(hybrids) do
    it("whole, in pieces, step by step and packed are the same: " .. name, function()
      local m = build(options)
      agrees(m)
      local short = { 9, 9, 1 }
      local both = table.move(short, 1, 3, #A + 1, { table.unpack(A) })
      local ctx = { cu_seqlens = moe.tensor({ 0, 9, 12 }, { dtype = "i64" }) }
      assert.close(moe.cat({ m(ids_of(A)), m(ids_of(short)) }, 2), m(ids_of(both), ctx), { rtol = 1e-8, atol = 1e-9 })
    end)
  end

  for kind, own in pairs(KINDS) do
    it("whole, in pieces and step by step are the same, sees nothing of the future, and all learns: " .. kind, function()
      local m = build { layer_types = { kind, "attention", kind }, mixers = { [kind] = own }, positional = "rope" }
      agrees(m)
      local changed = { table.unpack(A) }
      changed[6] = 3
      local y, z = m(ids_of(A)), m(ids_of(changed))
      assert.close(y:narrow(2, 1, 5), z:narrow(2, 1, 5), { rtol = 1e-12, atol = 1e-13 })
      assert.truthy((y:narrow(2, 6, 4) - z:narrow(2, 6, 4)):abs():amin(-1):amin():item() > 0)
      m:train()
      m(ids_of(A)):reshape { -1, 11 }:cross_entropy(moe.tensor(B, { dtype = "i64" })):backward()
      for pname, p in m:named_parameters() do
        assert.truthy(p.grad, pname)
        assert.truthy(p.grad:isfinite():all():item(), pname)
      end
    end)
  end

  it("repeats a pattern, takes functions and modules, and shares a module", function()
    local shared = nn.attention { d_model = 16, num_heads = 4, rope = true }
    local seen = {}
    local m = lm(merge(SMALL, {
      num_layers = 5, ffn = { "none", "dense" }, positional = "none", mixers = { mamba = function(i) return { d_state = i } end },
      layer_types = { "mamba", shared, function(i)
        seen[#seen + 1] = i
        return moe.mixer.gla { d_model = 16, num_heads = 2 }
      end },
    }))
    assert.same({ 3 }, seen)
    assert.equal(shared, m.layers[2].mixer)
    assert.equal(shared, m.layers[5].mixer)
    assert.same({ 32, 1 }, m.layers[1].mixer.A_log.shape)
    assert.same({ 32, 4 }, m.layers[4].mixer.A_log.shape)
    assert.is_nil(m.layers[1].ffn)
    assert.is_nil(m.layers[5].ffn)
    assert.truthy(m.layers[4].ffn)
    local names = {}
    for name in m:named_parameters() do names[name] = true end
    assert.truthy(names["layers.2.mixer.qkv_proj.weight"])
    assert.is_nil(names["layers.5.mixer.qkv_proj.weight"])
    agrees(m:to("f64"):eval())
    assert.equal(2, #lm { vocab_size = 5, d_model = 16, layer_types = { "mamba", "mamba" } }.layers)
  end)

  it("tells the first rwkv7, wherever it stands, and each lightning its depth", function()
    local m = build { layer_types = { "lightning", "rwkv7", "lightning", "rwkv7" }, num_layers = 4 }
    assert.is_nil(m.layers[2].mixer.v_lora)
    assert.truthy(m.layers[4].mixer.v_lora)
    local first, third = m.layers[1].mixer, m.layers[3].mixer
    assert.equal(1, first._options.layer)
    assert.equal(3, third._options.layer)
    assert.equal(4, third._options.num_layers)
  end)

  it("leaves the initial values of mixers other than attention", function()
    moe.manual_seed(1)
    local m = lm { vocab_size = 5, d_model = 64, num_layers = 2, layer_types = { "mamba", "attention" }, init = "zeros" }
    assert.equal(0, m.layers[2].mixer.qkv_proj.weight:abs():amax():item())
    assert.truthy(m.layers[1].mixer.in_proj.weight:std():item() > 0.05)
    assert.close(moe.arange(1, 16):log(), m.layers[1].mixer.A_log[1], { rtol = 1e-6 })
  end)

  it("needs no length where no layer needs one", function()
    assert.equal("none", lm { vocab_size = 5, d_model = 16, layer_types = { "mamba", "attention" } }.positional)
    assert.equal("learned", lm(SMALL).positional)
    assert.error_matches(function() lm { vocab_size = 5, d_model = 16, layer_types = { "attention" } } end, "needs max_seq_len")
  end)

  it("puts norms and residuals where it is told", function()
    local x = moe.randn(2, 3, 16, { dtype = "f64" })
    local function block(o)
      return moe.model.block(merge({ d_model = 16, norm = "rmsnorm", mixer = Scale(2), ffn = Scale(-3) }, o)):to "f64"
    end
    local function norm(t) return t:rms_norm(nil, 1e-5) end
    local eps = { norm_eps = 1e-5 }
    local h = x + norm(x) * 2
    assert.close(h - norm(h) * 3, (block(eps)(x)))
    h = norm(x + x * 2)
    assert.close(norm(h - h * 3), (block(merge(eps, { norm_placement = "post" }))(x)))
    h = x + norm(norm(x) * 2)
    assert.close(h + norm(norm(h) * -3), (block(merge(eps, { norm_placement = "sandwich" }))(x)))
    assert.close(x - norm(x), (block(merge(eps, { residual = "parallel" }))(x)))
    assert.close(norm(x + x * 2 - x * 3), (block(merge(eps, { residual = "parallel", norm_placement = "post" }))(x)))
    local n = norm(x)
    assert.close(x + norm(n * 2) + norm(n * -3), (block(merge(eps, { residual = "parallel", norm_placement = "sandwich" }))(x)))
    -- the last norm: of the stream, unless that is normed already
    assert.is_nil(build { norm_placement = "post" }.norm)
    assert.truthy(build { norm_placement = "sandwich" }.norm)
  end)

  it("says what is wrong", function()
    local function says(want, options) assert.error_matches(function() lm(merge(SMALL, options)) end, want) end
    says("the mixer of layer 2: there is no 'mambo' %(did you mean 'mamba'%?%); known: .*rwkv7", { layer_types = { "mamba", "mambo" } })
    says("the mixer of layer 1: there is no 'with_map'", { layer_types = "with_map" })
    says("the ffn of layer 1: there is no 'moee' %(did you mean 'moe'%?%); known: dense, moe, none", { ffn = "moee" })
    says("the mixer of layer 3 must be a name, a function%(layer%) or a module, got 4", { layer_types = { "mamba", "mamba", 4 } })
    says("layer_types lists 4 layers, num_layers is 3", { layer_types = { "mamba", "mamba", "mamba", "mamba" } })
    says("ffn is an empty list", { ffn = {} })
    says("layer_types and mixer are one option", { layer_types = "mamba", mixer = "mamba" })
    says("mixers holds options for 'mamba', but no layer is one %(did you mean 'mamba2'%?%)", {
      layer_types = "mamba2", mixers = { mamba = {} } })
    says("mixers.mamba must be a table of options or a function%(layer%) that gives one, got a number",
      { layer_types = "mamba", mixers = { mamba = 3 } })
    says("unknown option 'd_stat' %(did you mean 'd_state'%?%)", { layer_types = "mamba", mixers = { mamba = { d_stat = 3 } } })
    says("needs moe = { num_experts", { ffn = "moe" })
    says("option 'norm_placement' must be one of pre, post, sandwich", { norm_placement = "before" })
    assert.error_matches(function() lm { vocab_size = 3, d_model = 4, layer_types = "mamba" } end, "'num_layers' is missing")
    local m = build { layer_types = { "mamba", "attention" } }
    local function fails(want, state) assert.error_matches(function() m(ids_of(A, B), nil, state) end, want) end
    fails("mamba: state.conv must be %[2, 3, 32%], got %[1, 3, 32%]", m:state(1))
    fails("the state must be what model:state%(batch%) gives, got a number", 3)
    fails("the state must be what model:state%(batch%) gives, got a table without a position", {})
    local state = m:state(2)
    state[2] = nil
    fails("the state holds nothing for layer 2", state)
  end)
end)
