-- One side of a benchmark: answers the driver's lines on standard input with one line each, so that run.sh can let
-- two programs work in turns. A line `N` runs step() N times and answers "ms a step: mean, least"; `end` answers finish().
local M = {}

function M.blocks(step, finish)
  local clock = require "moe".clock
  for line in io.lines() do
    if line == "end" then
      print(finish())
      io.flush()
      return
    end
    local n = assert(math.tointeger(tonumber(line)), "a number of steps or 'end'")
    local least, began = math.huge, clock()
    for _ = 1, n do
      local t = clock()
      step()
      least = math.min(least, clock() - t)
    end
    print(("%.4f %.4f"):format((clock() - began) / n * 1e3, least * 1e3))
    io.flush()
  end
end

-- Resident bytes of this process.
function M.rss()
  local file = io.open "/proc/self/statm"
  if not file then return 0 end
  local _, pages = file:read("n", "n")
  file:close()
  return pages * 4096
end

-- The text that the published losses belong to.
function M.shakespeare()
  for _, dir in ipairs { os.getenv "MOE_DATA" or "../shared/data", "data" } do
    local path = dir .. "/tinyshakespeare.txt"
    local file = io.open(path)
    if file then
      file:close()
      return path
    end
  end
  error "tinyshakespeare.txt not found: set MOE_DATA to its folder"
end

return M
