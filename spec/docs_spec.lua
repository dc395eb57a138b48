-- The generated pages are what the tables say, every public name has a line, every example of the help runs.
local moe = require "moe"
local doc = require "moe.doc"
local docgen = require "moe.docgen"

describe("the documentation", function()
  local entries
  setup(function() entries = doc.entries() end)

  it("has a line for every public name", function()
    local without = {}
    for _, entry in ipairs(entries) do
      if not entry.doc or not entry.doc:match "%w" then without[#without + 1] = entry.path end
    end
    assert.equal("", table.concat(without, " "))
  end)

  it("has pages that do not drift", function()
    assert.equal("", table.concat(docgen.stale(), " "), "run lua5.4 lua/moe/docgen.lua")
  end)

  it("has notes on no function that is gone", function()
    local known = {}
    for _, entry in ipairs(entries) do
      known[entry.path] = true
      if entry.kind == "method" then known["*:" .. entry.name] = true end
    end
    local gone = {}
    for path in pairs(require "moe.coredoc") do
      if not known[path] then gone[#gone + 1] = path end
    end
    table.sort(gone)
    assert.equal("", table.concat(gone, " "))
  end)

  it("has stubs that are Lua", function()
    assert(loadfile("lua/moe/library/moe.d.lua", "t"))
  end)

  it("has examples that run", function()
    local failed = {}
    for _, entry in ipairs(entries) do
      if entry.example then
        local chunk = load("local moe = ... return " .. entry.example) or load("local moe = ... " .. entry.example)
        local ok, message = pcall(chunk or error, moe)
        if not ok then failed[#failed + 1] = entry.path .. ": " .. entry.example .. ": " .. tostring(message) end
      end
    end
    assert.equal("", table.concat(failed, "\n"))
  end)
end)

describe("moe.help", function()
  local help = moe.help

  it("tells signature, shapes and an example of an operation", function()
    local text = help.text "topk"
    assert.truthy(text:find("moe.topk(x", 1, true), text)
    assert.truthy(text:find("example: moe.topk(", 1, true), text)
    assert.equal(text, help.text "moe.topk")
  end)

  it("tells the options of a layer", function()
    local text = help.text "nn.linear"
    assert.truthy(text:find("in_features", 1, true), text)
  end)

  it("tells of Lua functions by the comment above them", function()
    assert.truthy(help.text("gradcheck"):find("central differences", 1, true))
    assert.truthy(help.text(moe.gradcheck):find("central differences", 1, true))
  end)

  it("knows methods", function() assert.truthy(help.text("totable"):find("totable", 1, true)) end)

  it("names similar names for one that is not there", function()
    local text, message = help.text "sofmax"
    assert.is_nil(text)
    assert.truthy(message:find("sofmax", 1, true))
    assert.truthy(select(2, help.text "softma"):find("softmax", 1, true))
  end)

  it("lists everything", function()
    local text = help.text()
    for _, name in ipairs { "matmul", "linear", "adamw", "totable" } do
      assert.truthy(text:find(name, 1, true), name)
    end
  end)
end)

describe("moe.repl", function()
  local repl = moe.repl

  it("completes names through tables, submodules and methods", function()
    local env = { moe = moe, x = moe.ones(2) }
    assert.same({ "moe.matmul" }, repl.complete("y = moe.matm", env))
    assert.same({ "x:softmax" }, repl.complete("print(x:softm", env))
    assert.truthy(#repl.complete("moe.nn.", env) > 3)
    assert.same({}, repl.complete("nothing.here", env))
  end)

  it("lists what lives in memory", function()
    local text = repl.who { x = moe.ones(10, 100), n = 5 }
    assert.truthy(text:find("x ", 1, true) and text:find("4 KB", 1, true), text)
  end)

  it("runs a prompt", function()
    local lines, out = { "1 + 1", "?topk", "x = moe.ones(2)", "for i = 1, 2 do", "x = x + i end", "x:sum():item()", "error 'oh'",
      "who()", ")" }, {}
    local i = 0
    repl.start {
      read = function()
        i = i + 1
        return lines[i]
      end,
      write = function(text) out[#out + 1] = text end,
    }
    local all = table.concat(out, "\n")
    assert.truthy(all:find("\n2\n", 1, true), all)
    assert.truthy(all:find("moe.topk", 1, true))
    assert.truthy(all:find("\n8", 1, true), all)
    assert.truthy(all:find("oh", 1, true))
    assert.truthy(all:find("f32 [2]", 1, true), all)
    assert.is_nil(rawget(_G, "who"))
  end)
end)
