-- Every row of the operation table, by its own examples: forward, gradients against central differences, strided views,
-- types, empty sizes, threads, method and function form, in-place form. A new row is covered by being there.
local helper = require "spec.helper"
local mini = require "spec.op.mini"
local moe = require "moe"
local doc = require "moe.doc"

local FLOAT = { f16 = true, bf16 = true, f32 = true, f64 = true }

local function results_of(...)
  local list = {}
  for i = 1, select("#", ...) do
    local v = select(i, ...)
    if type(v) == "userdata" then
      list[#list + 1] = v
    elseif type(v) == "table" then
      for _, t in ipairs(v) do list[#list + 1] = t end
    end
  end
  return list
end

-- Calls a row as a function where it has one, else as a method. Draws start from one seed.
local function call(row, args, form)
  moe.manual_seed(20)
  if form == "method" or (form == nil and row.method_only) then
    local first = args[1]
    return results_of(first[row.name](first, table.unpack(args, 2, args.n)))
  elseif form == "inplace" then
    local first = args[1]
    return results_of(first[row.name .. "_"](first, table.unpack(args, 2, args.n)))
  end
  return results_of(moe[row.name](table.unpack(args, 1, args.n)))
end

local function is_method(row)
  if row.function_only then return false end
  local first = doc.parameters(row.args)[1]
  return first ~= nil and (first.kind == "tensor" or first.kind == "operand")
end

local function bits_equal(a, b)
  if a.dtype ~= b.dtype then return false end
  local x, y = helper.flatten(a), helper.flatten(b)
  if #x ~= #y then return false end
  for i = 1, #x do
    if x[i] ~= y[i] and (x[i] == x[i] or y[i] == y[i]) then return false, i end
  end
  return true
end

-- The same arguments with f64 tensors of another floating type.
local function converted(args, dtype)
  return mini.map(args, function(t)
    if t.dtype == "f64" then return t:to(dtype) end
  end)
end

local function clones(args)
  return mini.map(args, function(t) return t:clone() end)
end

-- gradcheck of a row at given arguments, or false when the call has no f64 tensor to differentiate.
local function check_gradient(row, args)
  local inputs = {}
  for _, t in ipairs(mini.tensors(args)) do inputs[#inputs + 1] = t end
  local any = false
  for _, t in ipairs(inputs) do any = any or t.dtype == "f64" end
  if not any then return false end
  local function f(...)
    local given = { ... }
    local replaced = mini.map(args, function(_, place) return given[place] end)
    return table.unpack(call(row, replaced))
  end
  moe.gradcheck(f, inputs)
  return true
end

-- Every tensor argument as its kind-th strided view.
local function strided(args, kind)
  return mini.map(args, function(t)
    local list = helper.views(t)
    return (list[kind] or list[1])[2]
  end)
end

-- A row that promises a view may refuse strides that would need a copy, and then says so.
local function never_copies(row, args)
  if not row.view then return false end
  local ok, message = pcall(call, row, args)
  return not ok and message:find("needs a copy", 1, true) ~= nil
end

local unexampled = {}

for _, row in ipairs(moe.core.ops()) do
  local sets = mini.split(row.examples or "")
  if #sets == 0 and not row.internal and not row.nocheck then unexampled[#unexampled + 1] = row.name end
  if not row.internal and #sets > 0 then
    describe("operation " .. row.name, function()
      for _, set in ipairs(sets) do
        describe("(" .. set .. ")", function()
          local function arguments() return mini.evaluate(set) end

          it("runs, with the results its row promises", function()
            local args = arguments()
            local results = call(row, args)
            if row.results ~= "tensors" then
              local n = 0
              for _ in row.results:gmatch "[%w_]+" do n = n + 1 end
              assert.equal(n, #results)
            end
            for _, t in ipairs(results) do assert.equal(1, (t.dtype and 1)) end
          end)

          it("leaves its arguments as they were", function()
            local args = arguments()
            local before = {}
            for i, t in ipairs(mini.tensors(args)) do before[i] = t:totable() end
            call(row, args)
            for i, t in ipairs(mini.tensors(args)) do assert.close(before[i], t, { rtol = 0, atol = 0, nan = true }) end
          end)

          if row.differentiable and not row.nocheck then
            it("has the gradient that differences show", function() check_gradient(row, arguments()) end)
          end

          it("gives the same for strided views", function()
            local args = arguments()
            local expected = call(row, args)
            for kind = 1, 2 do
              local views = strided(args, kind)
              if never_copies(row, views) then return end
              local got = call(row, views)
              assert.equal(#expected, #got)
              for i = 1, #got do assert.close(expected[i], got[i], { rtol = 1e-12, atol = 1e-12, nan = true }) end
            end
          end)

          if row.differentiable and not row.nocheck then
            it("has the same gradients for strided views", function()
              for kind = 1, 2 do
                local views = mini.map(strided(arguments(), kind), function(t) return t:detach() end)
                if never_copies(row, views) then return end
                check_gradient(row, views)
              end
            end)
          end

          if not row.random then
            it("agrees in f32 and f64, and runs in bf16 and f16", function()
              local args = arguments()
              local expected = call(row, args)
              local floats = false
              for _, t in ipairs(mini.tensors(args)) do floats = floats or t.dtype == "f64" end
              if not floats then return end
              local single = converted(args, "f32")
              -- what the f32 inputs give in f64: the rounding of the inputs is not the operation's error
              local exact = call(row, mini.map(single, function(t)
                if t.dtype == "f32" then return t:to "f64" end
              end))
              local got = call(row, single)
              assert.equal(#expected, #got)
              for i = 1, #got do
                if FLOAT[got[i].dtype] then
                  local scale = 0
                  for _, v in ipairs(helper.flatten(exact[i])) do
                    if v == v and math.abs(v) < math.huge then scale = math.max(scale, math.abs(v)) end
                  end
                  assert.close(exact[i], got[i], { rtol = 2e-5, atol = 2e-5 * scale + 1e-7, nan = true })
                end
              end
              for _, dtype in ipairs { "bf16", "f16" } do
                local half = call(row, converted(args, dtype))
                assert.equal(#expected, #half)
                for i = 1, #half do assert.same(expected[i].shape, half[i].shape) end
              end
            end)
          end

          it("gives the same bits with 1 and 2 threads", function()
            local args = converted(arguments(), "f32")
            local before = moe.threads()
            moe.threads(1)
            local one = call(row, args)
            moe.threads(2)
            local two = call(row, args)
            moe.threads(before)
            for i = 1, #one do assert.is_true((bits_equal(one[i], two[i]))) end
          end)

          if is_method(row) and not row.method_only then
            it("is the same as a method and as a function", function()
              local args = arguments()
              if type(args[1]) ~= "userdata" then return end
              local as_function, as_method = call(row, args), call(row, args, "method")
              assert.equal(#as_function, #as_method)
              for i = 1, #as_method do assert.is_true((bits_equal(as_function[i], as_method[i]))) end
            end)
          end

          if row.inplace and not row.random then
            it("is the same in place", function()
              local args = clones(arguments())
              if type(args[1]) ~= "userdata" then return end
              local expected = call(row, args)
              if #expected ~= 1 or expected[1].dtype ~= args[1].dtype
                or table.concat(expected[1].shape, ",") ~= table.concat(args[1].shape, ",") then
                return -- a result of another shape cannot be written over the argument
              end
              local target = args[1]
              local got = call(row, args, "inplace")
              assert.is_true((bits_equal(expected[1], target)))
              assert.is_true((bits_equal(expected[1], got[1])))
            end)
          end

          it("answers empty sizes with a result or an ordinary error", function()
            local args = arguments()
            for d = 1, 3 do
              -- every tensor loses its d-th dimension's elements
              local emptied = mini.map(args, function(t)
                if #t.shape >= d then return t:narrow(d, 1, 0) end
              end)
              local ok, message = pcall(call, row, emptied)
              if not ok then
                assert.equal("string", type(message))
                assert.truthy(message:find(row.name, 1, true), "the message does not name the operation: " .. message)
              end
            end
          end)
        end)
      end
    end)
  end
end

describe("the operation table", function()
  it("has an example in every row that is not internal or marked as covered elsewhere", function()
    assert.equal("", table.concat(unexampled, " "))
  end)

  it("has a line of documentation, well-formed arguments and results in every row", function()
    for _, row in ipairs(moe.core.ops()) do
      assert.truthy(row.doc and #row.doc > 1, row.name .. " has no doc")
      assert.truthy(#row.results > 0, row.name .. " has no results")
      local commas = 0
      if row.args ~= "" then commas = #doc.parameters(row.args) end
      local _, colons = row.args:gsub("[%w_]+%s*:", "")
      assert.equal(colons, commas, row.name)
    end
  end)
end)
