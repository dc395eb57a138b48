-- Every Lua snippet of the README runs, one after the other in one environment, as a reader would type them.
local moe = require "moe"

local function snippets(path)
  local list, current, at, line_number = {}, nil, 0, 0
  for line in io.lines(path) do
    line_number = line_number + 1
    if current then
      if line:match "^```" then
        list[#list + 1] = { at = at, text = table.concat(current, "\n") }
        current = nil
      else
        current[#current + 1] = line
      end
    elseif line:match "^```lua%s*$" then
      current, at = {}, line_number
    end
  end
  return list
end

describe("README.md", function()
  local env
  setup(function()
    local out = {}
    env = setmetatable({ print = function(...) out[#out + 1] = table.pack(...) end }, { __index = _G })
  end)

  local list = snippets "README.md"

  it("has a tour", function() assert.truthy(#list >= 2) end)

  for _, snippet in ipairs(list) do
    it("runs the snippet at line " .. snippet.at, function()
      moe.manual_seed(1)
      -- a reader's locals live on in the next snippet
      local text = snippet.text:gsub("%f[%w]local%s+([%w_, ]+%s*=)", "%1"):gsub("%f[%w]local%s+function", "function")
      local chunk = assert(load(text, "=README.md:" .. snippet.at, "t", env))
      chunk()
    end)
  end

  it("has the gallery as the recipes tell it", function()
    local pipe = assert(io.popen(("LUA_PATH='%s' LUA_CPATH='%s' lua5.4 examples/recipes.lua markdown"):format(package.path, package.cpath)))
    local wanted = pipe:read "a"
    pipe:close()
    local file = assert(io.open "README.md")
    local text = file:read "a"
    file:close()
    local got = text:match "<!%-%- gallery: [^\n]*%-%->\n(.-)<!%-%- end of gallery %-%->"
    assert.equal(wanted, got)
  end)
end)
