-- Random calls with random arguments at the whole public interface: whatever comes, the answer is a result or an
-- ordinary Lua error whose message is a string that names the function. MOE_FUZZ_SEED repeats a run, MOE_FUZZ_CALLS
-- sets the number of calls.
local helper = require "spec.helper"
local moe = require "moe"
local doc = require "moe.doc"

local SEED = tonumber(os.getenv "MOE_FUZZ_SEED") or 20240607
local CALLS = tonumber(os.getenv "MOE_FUZZ_CALLS") or 100000

-- Not called: what reads a terminal, writes files, runs for long, or changes the process for the specs that follow.
local SKIP = {
  ["moe.help"] = "prints", ["moe.threads"] = "starts threads", ["moe.gradcheck"] = "runs for long",
  ["moe.no_grad"] = "calls what it is given", ["moe.enable_grad"] = "calls what it is given",
  ["moe.inspect.trace"] = "writes files",
  ["moe.io.save"] = "writes files", ["moe.io.write"] = "writes files", ["moe.io.make_dir"] = "writes files",
  ["moe.io.remove"] = "removes files", ["*:save"] = "writes files", ["*:fit"] = "runs for long", ["*:resume"] = "runs for long",
  ["*:register_hook"] = "calls ours later", ["moe.fail_after"] = "makes what follows fail",
}
local SKIP_GROUP = { repl = true, help = true }

-- Sizes that a product of a few keeps small, sizes that no machine has, and the edges.
local SMALL = { 0, 1, 2, 3, 4, 5, 7, -1, -2, -3 }
local ODD = {
  1 << 52, math.maxinteger, math.mininteger, -(1 << 52), 1 << 62, 0.5, -0.0, 1e300, -1e300, math.huge, -math.huge, 0 / 0,
  1e-320, 2.0, -7,
}
local WORDS = {
  "", "f32", "f64", "bf16", "f16", "i64", "i32", "u8", "bool", "cpu", "cuda", "cuda:99", "mean", "sum", "none", "erf", "tanh",
  "ij,jk->ik", "ii->i", "i,i->", "...ij->...ji", "ij->k", "nonsense", "softmax", "sigmoid", "\0\1\255", ("x"):rep(300), "3",
  "%s%n%d", "constant", "reflect",
}
local KEYS = {
  "dim", "keepdim", "dtype", "device", "requires_grad", "k", "eps", "lr", "d_model", "num_experts", "top_k", "bias", "p",
  "n", "size", "betas", "steps", "score", "no_such_option", 1, 2, 1.5, true,
}

local function fuzzer(seed)
  local r = helper.random(seed)
  local function pick(list) return list[r(#list)] end
  local pool, anything = {}, nil
  local DTYPES = { "f32", "f32", "f32", "f64", "bf16", "f16", "i64", "i32", "u8", "bool" }

  local function shape()
    local s = {}
    for d = 1, r(0, 4) do s[d] = r() < 0.06 and 0 or r(1, 5) end
    return s
  end

  local function tensor()
    if #pool > 0 and r() < 0.6 then return pick(pool) end
    local dtype = pick(DTYPES)
    local kind = r(4)
    local t = helper.tensor(function()
      if kind == 1 then return r(0, 4) elseif kind == 2 then return r(1, 3) end
      local v = r.normal()
      if kind == 4 and r() < 0.1 then v = pick { 0 / 0, math.huge, -math.huge, 0, 1e30 } end
      if dtype == "i64" or dtype == "i32" or dtype == "u8" then v = r(0, 4) end
      if dtype == "bool" then return v > 0 end
      return v
    end, shape(), { dtype = dtype })
    if r() < 0.3 and (dtype == "f32" or dtype == "f64") then t.requires_grad = true end
    if #t.shape > 1 and r() < 0.3 then t = t:transpose(1, -1) end
    if r() < 0.02 then
      t:close()
      return t
    end
    if #pool < 60 then pool[#pool + 1] = t else pool[r(60)] = t end
    return t
  end

  local FUNCTIONS = {
    function(...) return ... end,
    function(x) return x * 2 end,
    function() return nil end,
    function() error "callback failed" end,
    function() error({}) end,
    function() return moe.zeros(2, 2) end,
    function(...) return select("#", ...) end,
  }
  local recursive = {}
  recursive[1] = recursive
  local hostile = setmetatable({}, {
    __index = function() error "hostile index" end, __len = function() error "hostile length" end,
    __pairs = function() error "hostile pairs" end, __tostring = function() error "hostile tostring" end,
  })

  local function number()
    if r() < 0.8 then return pick(SMALL) end
    return pick(ODD)
  end

  local function list(depth)
    local t = {}
    local make = pick { number, number, tensor, function() return anything(depth + 1) end }
    for i = 1, r(0, 4) do t[i] = make() end
    if r() < 0.1 then t[r(1, 9)] = anything(depth + 1) end
    return t
  end

  local function options(depth)
    local t = {}
    for _ = 1, r(0, 3) do t[pick(KEYS)] = anything(depth + 1) end
    return t
  end

  local thread = coroutine.create(function() end)
  function anything(depth)
    depth = depth or 0
    local k = r(100)
    if k <= 38 then return tensor()
    elseif k <= 62 then return number()
    elseif k <= 72 then return pick(WORDS)
    elseif k <= 76 then return r() < 0.5
    elseif k <= 79 then return nil
    elseif k <= 88 then return depth < 3 and list(depth) or number()
    elseif k <= 94 then return depth < 3 and options(depth) or number()
    elseif k <= 98 then return pick(FUNCTIONS)
    end
    return pick { recursive, hostile, thread, io.stderr, type, math }
  end

  -- An argument of the kind that the signature asks for.
  local BY_KIND = {
    tensor = tensor, operand = function() return r() < 0.8 and tensor() or number() end,
    index = function()
      return helper.tensor(function() return r() < 0.95 and r(1, 4) or pick { 0, -1, 99, 250 } end, shape(),
        { dtype = pick { "i64", "i32", "u8" } })
    end,
    tensors = function()
      local t = {}
      for i = 1, r(1, 3) do t[i] = tensor() end
      return t
    end,
    number = number, int = number,
    dim = function() return pick { 1, 2, 3, -1, -2, 0, 9 } end, dims = function()
      if r() < 0.5 then return pick { 1, 2, -1, 0 } end
      return { pick { 1, 2, -1 }, pick { 1, 2, 3, -2 } }
    end,
    pos = function() return pick { 1, 2, 3, -1, 0, 99 } end,
    ints = function()
      local t = {}
      for i = 1, r(0, 4) do t[i] = r() < 0.93 and r(0, 3) or number() end
      return t
    end,
    bool = function() return r() < 0.5 end,
    dtype = function() return pick(DTYPES) end, device = function() return r() < 0.8 and "cpu" or pick(WORDS) end,
    string = function() return pick(WORDS) end,
  }
  local function by_signature(params)
    local args = { n = #params }
    for i, p in ipairs(params) do
      if r() < 0.06 then
        args[i] = anything()
      elseif p.optional and r() < 0.5 then
        args[i] = nil
      elseif p.choices then
        args[i] = r() < 0.9 and pick(p.choices) or pick(WORDS)
      else
        args[i] = (BY_KIND[p.kind] or anything)()
      end
    end
    while args.n > 0 and args[args.n] == nil do args.n = args.n - 1 end
    return args
  end
  local function garbage()
    local args = { n = r(0, 5) }
    for i = 1, args.n do args[i] = anything() end
    return args
  end
  -- Counts and classes that memory could just hold would only make the run slow.
  local function awkward(t)
    if t.dtype ~= "i64" and t.dtype ~= "i32" then return false end
    for _, v in ipairs(helper.flatten(t)) do
      if math.abs(v) > 1000 and math.abs(v) < (1 << 50) then return true end
    end
    return false
  end
  local function keep(value)
    if type(value) == "userdata" and pcall(function() return value:numel() end) and value:numel() <= 4096
      and not awkward(value) then
      pool[#pool < 60 and #pool + 1 or r(60)] = value
    end
  end
  return { r = r, tensor = tensor, anything = anything, by_signature = by_signature, garbage = garbage, keep = keep, pick = pick }
end

-- Every public function: { path, name, function, parameters or nil }.
local function targets()
  local list = {}
  local params = {}
  for _, row in ipairs(moe.core.ops()) do params["moe." .. row.name] = doc.parameters(row.args) end
  local function add(path, name, f, p)
    if not SKIP[path] then list[#list + 1] = { path = path, name = name, f = f, params = p } end
  end
  local function walk(prefix, t)
    local names = {}
    for name, value in next, t do
      if type(name) == "string" and type(value) == "function" and not name:match "^_" then names[#names + 1] = name end
    end
    table.sort(names)
    for _, name in ipairs(names) do add(prefix .. name, name, t[name], params[prefix .. name]) end
  end
  walk("moe.", moe)
  for _, group in ipairs(doc.GROUPS) do
    local ok, value = pcall(function() return moe[group] end)
    if ok and type(value) == "table" and not SKIP_GROUP[group] then walk("moe." .. group .. ".", value) end
  end
  for _, class in ipairs(doc.classes()) do
    local names = {}
    for name, value in pairs(class[2]) do
      if type(name) == "string" and type(value) == "function" and not name:match "^_" and not SKIP["*:" .. name] then
        names[#names + 1] = name
      end
    end
    table.sort(names)
    for _, name in ipairs(names) do
      local known = class[1] == "moe.Tensor" and params["moe." .. name:gsub("_$", "")]
      add(class[1] .. ":" .. name, name, class[2][name], known)
      list[#list].class = class[1]
    end
  end
  return list
end

-- One or more objects of every class, for its methods.
local function instances(tensor)
  local linear = moe.nn.linear(4, 3)
  local made = {
    ["moe.Tensor"] = tensor,
    ["moe.Module"] = { linear, moe.nn.layernorm(4), moe.nn.embedding(5, 4) },
    ["moe.Routing"] = {
      moe.routing.topk(helper.tensor({ 1, 2, 2, 3 }, { 2, 2 }, { dtype = "i64" }), moe.ones(2, 2), 4),
      moe.routing.dense(helper.tensor({ 0, 1, 0.5, 0.5 }, { 2, 2 })),
    },
    ["moe.Optimizer"] = { moe.optim.adamw(linear, { lr = 1e-3 }), moe.optim.sgd(linear, { lr = 1e-3 }) },
  }
  return function(class, r)
    local list = made[class]
    if type(list) == "table" then return list[r(#list)] end
    if list then return list() end
  end
end

-- A message must name what was called: an operation by its name, other functions by theirs or their object's before a
-- colon. An error that a caller's own function raised is passed on as it is, and a method of Lua that is handed a
-- wrong `self` fails as Lua fails.
local function names_function(message, target, fair)
  if message:find("callback failed", 1, true) or message:find("hostile", 1, true) then return true end
  if message:match "^spec/fuzz_spec%.lua:" or message:find("out of memory", 1, true) then return true end
  if not fair and debug.getinfo(target.f, "S").what ~= "C" then return true end
  local name = target.name:gsub("_$", "")
  local bare = message:gsub("^[%w_%./]+%.lua:%d+: ", "")
  if bare:match "^bad argument #%d+ to '" then return bare:find(name, 1, true) ~= nil end
  if bare:match "^attempt to" then return false end
  if target.params then return message:find(name, 1, true) ~= nil end
  return bare:match "^[%a_][%w_%.:]*: " ~= nil or bare:find(name, 1, true) ~= nil
end

describe("random calls", function()
  it("give results or ordinary errors", function()
    local fuzz = fuzzer(SEED)
    local list = targets()
    local instance = instances(fuzz.tensor)
    assert.truthy(#list > 50)
    local calls = CALLS
    local trace = os.getenv "MOE_FUZZ_TRACE"
    local unnamed, told, errors, results = {}, {}, 0, 0
    local random_print = io.output()
    for i = 1, calls do
      local target = list[fuzz.r(#list)]
      local fair, args = true
      if target.params and fuzz.r() < 0.8 then
        args = fuzz.by_signature(target.params)
      else
        args = fuzz.garbage()
        if target.class then
          local self = fuzz.r() < 0.95 and instance(target.class, fuzz.r) or nil
          fair = self ~= nil
          table.move(args, 1, args.n, 2)
          args[1] = self
          args.n = args.n + 1
        end
      end
      if trace then io.stderr:write(i, " ", target.path, "\n") end
      local answer = table.pack(pcall(target.f, table.unpack(args, 1, args.n)))
      if answer[1] then
        results = results + 1
        for k = 2, math.min(answer.n, 4) do fuzz.keep(answer[k]) end
      else
        errors = errors + 1
        local message = answer[2]
        if type(message) ~= "string" then
          -- only an error value that a callback of ours raised may be no string
          assert.equal("table", type(message), target.path .. ": the error is a " .. type(message))
        elseif not told[target.path] and not names_function(message, target, fair) then
          told[target.path] = true
          unnamed[#unnamed + 1] = ("call %d, %s: %s"):format(i, target.path, message)
        end
      end
      if i % 500 == 0 then
        instance = instances(fuzz.tensor) -- some were closed, frozen or filled with nonsense
        -- printing and indexing belong to the interface too
        local t = fuzz.tensor()
        pcall(tostring, t)
        pcall(function() return t[fuzz.anything()] end)
        pcall(function() t[fuzz.anything()] = fuzz.anything() end)
        pcall(function() return t + fuzz.anything() end)
      end
    end
    io.output(random_print)
    assert(results > calls // 50, "too few of the calls succeed to say anything: " .. results)
    assert(#unnamed == 0, ("seed %d: %d messages do not name the function:\n%s"):format(SEED, #unnamed,
      table.concat(unnamed, "\n")))
    assert.truthy(errors > 0)
  end)

  it("at operators and indices give results or ordinary errors", function()
    local fuzz = fuzzer(SEED + 1)
    local operators = {
      function(a, b) return a + b end, function(a, b) return a - b end, function(a, b) return a * b end,
      function(a, b) return a / b end, function(a, b) return a ^ b end, function(a, b) return a % b end,
      function(a) return -a end, function(a) return #a end, function(a, b) return a == b end, function(a, b) return a < b end,
      function(a, b) return a .. b end, function(a, b) return a[b] end, function(a, b, c) a[b] = c end,
      function(a) return tostring(a) end, function(a, b) return a(b) end, function(a) return a.shape end,
      function(a, b) return a[{ b }] end, function(a, b, c) return a[{ { b, c } }] end, function(a, b, c) a.requires_grad = b + c end,
      function(a, b) return a // b end, function(a, b) return a & b end, function(a) return next, pairs(a) end,
    }
    for _ = 1, CALLS // 10 do
      local f = operators[fuzz.r(#operators)]
      local ok, message = pcall(f, fuzz.tensor(), fuzz.anything(), fuzz.anything())
      if ok then fuzz.keep(message) else assert.truthy(type(message) == "string" or type(message) == "table") end
    end
  end)
end)
