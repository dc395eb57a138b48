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

local function run(dir, tail)
  local command = ("LUA_PATH='%s' LUA_CPATH='%s' lua5.4 '%s/script.lua' '%s/run' '%s/out' %s"):format(
    package.path, package.cpath, dir, dir, dir, tail)
  os.execute(("sh -c \"%s\" 2> '%s/err'"):format(command:gsub("[$]", "\\$"), dir))
end

describe("a saving process", function()
  it("may be killed 50 times #slow", function()
    local dir = helper.temporary ".kill"
    moe.io.make_dir(dir)
    moe.io.write(dir .. "/script.lua", script)
    local r = helper.random(5)
    for _ = 1, 50 do
      local delay = helper.sanitize and 0.5 + 0.5 * r() or 0.05 + 0.1 * r()
      run(dir, ("& p=$!; sleep %.3f; kill -9 $p; wait $p"):format(delay))
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
    local files = moe.io.list(dir .. "/run")
    assert.is_true(#files <= 2 + 1 + 2, table.concat(files, " "))
    os.execute("rm -rf '" .. dir .. "'")
  end)

  it("is stopped by Ctrl-C with a checkpoint of the last whole step", function()
    local dir = helper.temporary ".int"
    moe.io.make_dir(dir)
    moe.io.write(dir .. "/script.lua", (script:gsub("every = 1,", "every = 1000000,"):gsub("quiet = true,", "")))
    -- the signal comes a while after the process has told that it began
    local function stop(signal, lines)
      run(dir, ("& p=$!; for i in 1 2 3 4 5 6 7 8 9; do sleep 0.2; grep -c ok '%s/out' | grep -q %d && break; done; sleep 0.2; ")
        :format(dir, lines) .. "kill -" .. signal .. " $p; wait $p")
    end
    stop("INT", 1)
    local step = moe.io.read(dir .. "/err"):match "interrupted after step (%d+); saved "
    assert.is_truthy(step, moe.io.read(dir .. "/err"))
    stop("9", 2)
    assert.equal("ok 0\nok " .. step .. "\n", moe.io.read(dir .. "/out"))
    os.execute("rm -rf '" .. dir .. "'")
  end)
end)
