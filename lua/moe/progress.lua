--- A progress line: moe.progress(n) on standard error, at most ten times a second on a terminal, and elsewhere one
-- plain line at each tenth of the way.
--
--   local bar <close> = moe.progress(1000)
--   for i = 1, 1000 do bar(i, { loss = 0.5 }) end
--
-- Options: quiet (write nothing), every (plain lines every so many steps), write (a function that takes the text),
-- terminal (true, false: do not ask), start (steps made before).

local core = require "moe.core"
local check = require("moe.options").check

local Bar = {}
Bar.__index = Bar

local function duration(s)
  s = math.floor(s + 0.5)
  if s >= 3600 then return ("%d:%02d:%02d"):format(s // 3600, s % 3600 // 60, s % 60) end
  return ("%d:%02d"):format(s // 60, s % 60)
end

local function quantity(x)
  if x >= 1e6 then return ("%.2fM"):format(x / 1e6) end
  if x >= 1e4 then return ("%.1fk"):format(x / 1e3) end
  return ("%.0f"):format(x)
end

local function number(v)
  if type(v) ~= "number" then return tostring(v) end
  if math.type(v) == "integer" then return tostring(v) end
  local size = math.abs(v)
  return size ~= 0 and (size < 1e-3 or size >= 1e5) and ("%.2e"):format(v) or ("%.4f"):format(v)
end

-- Fields in the order of their names, "loss" first; `rate` in words.
local function fields_text(fields)
  if type(fields) == "string" then return fields end
  local names, parts = {}, {}
  for k in pairs(fields or {}) do
    if k ~= "tokens_per_second" then names[#names + 1] = k end
  end
  table.sort(names, function(a, b)
    if (a == "loss") ~= (b == "loss") then return a == "loss" end
    return tostring(a) < tostring(b)
  end)
  for _, k in ipairs(names) do parts[#parts + 1] = ("%s %s"):format(k, number(fields[k])) end
  local rate = fields and fields.tokens_per_second
  if rate then parts[#parts + 1] = quantity(rate) .. " tokens/s" end
  return table.concat(parts, "  ")
end

function Bar:text(i, fields)
  local head = self.n and ("%d/%d"):format(i, self.n) or tostring(i)
  local parts = { self.label and self.label .. " " .. head or head, fields_text(fields) }
  local made = i - self.start
  if self.n and made > 0 then
    local elapsed = core.clock() - self.began
    parts[#parts + 1] = i < self.n and duration(elapsed / made * (self.n - i)) .. " left" or duration(elapsed)
  end
  return table.concat(parts, "  ")
end

-- Is it time to show step i?
function Bar:due(i)
  if self.quiet then return false end
  if i == self.n then return true end
  if self.terminal then return core.clock() - self.shown >= 0.1 end
  return i % self.every == 0 or (i == self.start + 1 and i == 1)
end

--- Shows step i when it is due.
function Bar:__call(i, fields)
  if not self:due(i) then return end
  self.shown = core.clock()
  local text = self:text(i, fields)
  if self.terminal then
    local pad = math.max(0, (self.width or 0) - #text)
    self.width = i ~= self.n and #text or nil
    self.write("\r" .. text .. (" "):rep(pad) .. (self.width and "" or "\n"))
  else
    self.write(text .. "\n")
  end
end

--- A line of its own, above the moving one; fields as for a step.
function Bar:line(text, fields)
  if self.quiet then return end
  if fields then text = text .. "  " .. fields_text(fields) end
  if self.terminal and self.width then
    text = "\r" .. text .. (" "):rep(math.max(0, self.width - #text))
    self.width = nil
  end
  self.write(text .. "\n")
end

--- Ends the moving line.
function Bar:close()
  if not self.quiet and self.terminal and self.width then self.write("\n") end
  self.width = nil
end
Bar.__close = Bar.close

local known <const> = { quiet = true, every = true, write = true, terminal = true, start = true, label = true }

return function(n, options)
  options = check("progress", options, known)
  local terminal = options.terminal
  if terminal == nil then terminal = core._files.is_terminal(2) and os.getenv "TERM" ~= "dumb" end
  return setmetatable({
    n = n,
    label = options.label,
    quiet = options.quiet or false,
    terminal = terminal,
    start = options.start or 0,
    every = options.every or math.max(1, (n or 1000) // 10),
    write = options.write or function(text) io.stderr:write(text) end,
    began = core.clock(),
    shown = -1,
  }, Bar)
end
