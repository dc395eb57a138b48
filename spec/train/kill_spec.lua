local moe = require "moe"
local helper = require "spec.helper"

-- A process that trains and saves at every step, killed at any moment: whatever it leaves can be resumed, and is of one
-- piece. After step n every weight is n.
local script = [[
  local dir, out = ...
  local moe = require "moe"
  local w = moe.zeros(30000, { requires_grad = true })
  local trainer = moe.trainer { model = { w }, optimizer = moe.optim.sgd { lr = 1, momentum = 1e-30 }, quiet = true,
    loss = function(m) return -m[1]:sum() end, checkpoint = { dir = dir, every = 1, keep = 2 } }
  local step, message = trainer:resume()
  local f = assert(io.open(out, "a"))
  local least, most = w:min():item(), w:max():item()
  if step == nil then f:write("bad ", message, "\n")
  elseif step and (least ~= step or most ~= step) then f:write(("bad step %d holds %g .. %g\n"):format(step, least, most))
  else f:write("ok ", tostring(step or 0), "\n") end
  f:close()
  trainer:fit(function() return {} end, { steps = 1000000 })
]]

describe("a saving process", function()
  it("may be killed 50 times #slow", function()
    local dir = helper.temporary ".kill"
    moe.io.make_dir(dir)
    moe.io.write(dir .. "/script.lua", script)
    local r = helper.random(5)
    local run = dir .. "/run"
    for _ = 1, 50 do
      local delay = helper.sanitize and 0.5 + 0.5 * r() or 0.05 + 0.1 * r()
      local command = ("LUA_PATH='%s' LUA_CPATH='%s' lua5.4 '%s/script.lua' '%s' '%s/out' & p=$!; sleep %.3f; kill -9 $p; wait $p"):format(
        package.path, package.cpath, dir, run, dir, delay)
      os.execute(("sh -c \"%s\" 2> /dev/null"):format(command:gsub("[$]", "\\$")))
    end
    local before, resumed, starts = 0, 0, 0
    for line in io.lines(dir .. "/out") do
      local step = line:match "^ok (%d+)$"
      assert.is_truthy(step, line)
      step = tonumber(step)
      assert.is_true(step >= before) -- nothing that was saved is lost
      if step > before then resumed = resumed + 1 end
      before, starts = step, starts + 1
    end
    assert.is_true(starts >= 25, starts)
    assert.is_true(resumed >= 10, resumed)
    -- at most the two that are kept, and what the last kill left behind
    local files = moe.io.list(run)
    assert.is_true(#files <= 2 + 1 + 2, table.concat(files, " "))
    os.execute("rm -rf '" .. dir .. "'")
  end)
end)
