--- moe.plot: pictures of routings and of training, as SVG or PNG through gnuplot, or as blocks in the terminal.
--
--   print(moe.plot.load_over_time(loads))                       -- a string of blocks
--   moe.plot.load_over_time(loads, { file = "load.svg" })       -- true, or nil and a message (no gnuplot, no such folder)
--
-- Options of all: file (ends in .svg or .png; absent: text), title, xlabel, ylabel, width, height (pixels of a file, default 640 x
-- 400), columns (of the text, default 64).

local core = require "moe.core"
local options = require "moe.nn.options"
local routing_of = require "moe.routing"

local M = {}

local ROWS <const> = {
  file = { "string" }, title = { "string", "" }, xlabel = { "string", "" }, ylabel = { "string", "" }, width = { "integer", 640 },
  height = { "integer", 400 }, columns = { "integer", 64 }, xnames = { "table" }, ynames = { "table" }, min = { "number" },
  max = { "number" },
}

local function read(name, given, defaults)
  local o = options.read("plot." .. name, given, ROWS, 3)
  for k, v in pairs(defaults or {}) do
    if o[k] == nil or o[k] == "" then o[k] = v end
  end
  return o
end

-- Rows of numbers from a tensor [rows, columns] or a table of tables.
local function matrix(name, value)
  local rows = core.is_tensor(value) and value:detach():to "f64":totable() or value
  if type(rows) ~= "table" or type(rows[1]) ~= "table" or #rows[1] == 0 then
    local what = type(value) == "table" and "an empty table" or "a " .. type(value)
    if core.is_tensor(value) then what = "[" .. table.concat(value.shape, ", ") .. "]" end
    error(("plot.%s: argument 1 must be a tensor or a table of [rows, columns], got %s"):format(name, what), 3)
  end
  for i, row in ipairs(rows) do
    if type(row) ~= "table" or #row ~= #rows[1] then
      error(("plot.%s: row %d has not the %d columns of row 1"):format(name, i, #rows[1]), 3)
    end
    for j, v in ipairs(row) do
      if type(v) ~= "number" then error(("plot.%s: [%d, %d] is no number"):format(name, i, j), 3) end
    end
  end
  return rows
end

-- --- gnuplot ---

local function quoted(s) return "'" .. tostring(s):gsub("'", "''"):gsub("[\r\n]", " ") .. "'" end

local TERMINALS <const> = {
  svg = "svg size %d,%d font 'Helvetica,12' background 'white'", png = "pngcairo size %d,%d font 'Helvetica,11'",
}

-- Runs gnuplot on lines of commands and data: true, or nil and what went wrong.
local function draw(o, lines)
  local kind = o.file:match "%.(%a+)$"
  local terminal = TERMINALS[kind and kind:lower() or ""]
  if not terminal then error(("plot: the file must end in .svg or .png, got '%s'"):format(o.file), 3) end
  local probe, cannot = io.open(o.file, "w") -- gnuplot's own message would come late and say less
  if not probe then return nil, cannot end
  probe:close()
  local script = os.tmpname()
  local file = assert(io.open(script, "w"))
  file:write("set terminal ", terminal:format(o.width, o.height), "\nset output ", quoted(o.file), "\nset encoding utf8\n",
    "set title ", quoted(o.title), " noenhanced\nset xlabel ", quoted(o.xlabel), " noenhanced\n",
    "set ylabel ", quoted(o.ylabel), " noenhanced\n",
    "set border lc rgb '#808080'\nset tics nomirror out\n", table.concat(lines, "\n"), "\n")
  file:close()
  local pipe = io.popen(("gnuplot %s 2>&1"):format(quoted(script)))
  local said = pipe and pipe:read "a" or ""
  local ok = pipe and pipe:close()
  os.remove(script)
  if ok then return true end
  os.remove(o.file)
  return nil, "gnuplot: " .. (said:match "%S.*%S" or "not found (the Debian package is gnuplot-nox)"):gsub("%s+", " ")
end

-- --- blocks ---

local SHADES <const> = { " ", "░", "▒", "▓", "█" }
local BARS <const> = { "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█" }

local function shade(v, low, high, signs)
  if v ~= v then return "?" end
  local p = high > low and (v - low) / (high - low) or 0
  return signs[1 + math.max(0, math.min(#signs - 1, math.floor(p * #signs)))]
end

-- Rows with at most `n` columns: neighbours become their mean.
local function shrink(row, n)
  if #row <= n then return row end
  local out = {}
  for i = 1, n do
    local from, to = (i - 1) * #row // n + 1, i * #row // n
    local sum = 0.0
    for j = from, to do sum = sum + row[j] end
    out[i] = sum / (to - from + 1)
  end
  return out
end

local function range(rows, o)
  local low, high = o.min or math.huge, o.max or -math.huge
  for _, row in ipairs(rows) do
    for _, v in ipairs(row) do
      if not o.min and v < low then low = v end
      if not o.max and v > high then high = v end
    end
  end
  if low > high then low, high = 0, 1 end
  return low, high
end

local function pad(text, width)
  local n = utf8.len(text) or #text
  return n >= width and text or text .. (" "):rep(width - n)
end

local function number(v)
  return math.type(v) == "integer" and tostring(v) or ("%.4g"):format(v)
end

-- --- forms ---

--- Numbers [rows, columns] as shades; xnames and ynames label columns and rows, min and max set the range of the scale.
function M.heatmap(values, given)
  local o, rows = read("heatmap", given), matrix("heatmap", values)
  local low, high = range(rows, o)
  if not o.file then
    local out = { o.title ~= "" and o.title or nil }
    local width = 0
    for i = 1, #rows do width = math.max(width, utf8.len(tostring(o.ynames and o.ynames[i] or i)) or 0) end
    for i, row in ipairs(rows) do
      local signs = {}
      for j, v in ipairs(shrink(row, o.columns)) do signs[j] = shade(v, low, high, SHADES) end
      out[#out + 1] = pad(tostring(o.ynames and o.ynames[i] or i), width) .. " |" .. table.concat(signs) .. "|"
    end
    local across = o.xlabel ~= "" and ", across: " .. o.xlabel or ""
    out[#out + 1] = ("%s  %s to %s%s"):format((" "):rep(width), number(low), number(high), across)
    return table.concat(out, "\n")
  end
  local lines = {
    "set palette defined (0 '#ffffff', 0.25 '#c6dbef', 0.5 '#6baed6', 0.75 '#2171b5', 1 '#08306b')",
    ("set cbrange [%.9g:%.9g]"):format(low, high > low and high or low + 1), "unset key",
    ("set xrange [0.5:%g]"):format(#rows[1] + 0.5), ("set yrange [%g:0.5]"):format(#rows + 0.5), "$data << EOD",
  }
  for i, row in ipairs(rows) do
    for j, v in ipairs(row) do lines[#lines + 1] = ("%d %d %.9g"):format(j, i, v == v and v or low) end
  end
  lines[#lines + 1] = "EOD"
  for _, axis in ipairs { { "x", o.xnames, #rows[1] }, { "y", o.ynames, #rows } } do
    if axis[2] then
      local names = {}
      for i = 1, axis[3] do names[i] = quoted(axis[2][i] or "") .. " " .. i end
      local turned = axis[1] == "x" and axis[3] > 12 and " rotate" or ""
      lines[#lines + 1] = ("set %stics (%s)%s noenhanced"):format(axis[1], table.concat(names, ", "), turned)
    end
  end
  lines[#lines + 1] = "plot $data using 1:2:3 with image pixels"
  return draw(o, lines)
end

local SERIES <const> = "a list of { name =, y = {..} [, x = {..}] [, spread = {..}] }"

--- Curves: a list of { name =, y = {..} [, x = {..}, spread = {..}] }; spread draws a band of y +- spread.
function M.lines(series, given)
  local o = read("lines", given)
  if type(series) ~= "table" or type(series[1]) ~= "table" then
    error("plot.lines: argument 1 must be " .. SERIES .. ", got a " .. type(series), 2)
  end
  for i, s in ipairs(series) do
    if type(s) ~= "table" or type(s.y) ~= "table" or #s.y == 0 or s.x and #s.x ~= #s.y or s.spread and #s.spread ~= #s.y then
      error(("plot.lines: entry %d of argument 1 is not of the form %s"):format(i, SERIES), 2)
    end
  end
  if not o.file then
    local rows, width = {}, 0
    for i, s in ipairs(series) do
      rows[i] = s.y
      width = math.max(width, utf8.len(s.name or tostring(i)) or 0)
    end
    local low, high = range(rows, o)
    local out = { o.title ~= "" and o.title or nil }
    for i, s in ipairs(series) do
      local signs = {}
      for j, v in ipairs(shrink(s.y, o.columns)) do signs[j] = shade(v, low, high, BARS) end
      out[#out + 1] = ("%s %s %s"):format(pad(s.name or tostring(i), width), table.concat(signs), number(s.y[#s.y]))
    end
    out[#out + 1] = ("%s %s to %s"):format((" "):rep(width), number(low), number(high))
    return table.concat(out, "\n")
  end
  local lines, plots = {
    "set grid lc rgb '#e0e0e0'", "set key outside right noenhanced", "set style fill transparent solid 0.2 noborder",
  }, {}
  if o.min or o.max then lines[#lines + 1] = ("set yrange [%s:%s]"):format(o.min or "", o.max or "") end
  for i, s in ipairs(series) do
    lines[#lines + 1] = ("$s%d << EOD"):format(i)
    for j, v in ipairs(s.y) do
      if v == v and math.abs(v) < math.huge then
        lines[#lines + 1] = ("%.9g %.9g %.9g"):format(s.x and s.x[j] or j, v, s.spread and s.spread[j] or 0)
      end
    end
    lines[#lines + 1] = "EOD"
    if s.spread then plots[#plots + 1] = ("$s%d using 1:($2-$3):($2+$3) with filledcurves lc %d notitle"):format(i, i) end
    plots[#plots + 1] = ("$s%d using 1:2 with lines lw 2 lc %d title %s"):format(i, i, quoted(s.name or i))
  end
  lines[#lines + 1] = "plot " .. table.concat(plots, ", ")
  return draw(o, lines)
end

--- One bar a name, with a whisker of +- spread where it is given: names and values, lists of one length. The axis begins at `min`
-- (default 0).
function M.bars(names, values, spread, given)
  local o = read("bars", given)
  if type(names) ~= "table" or type(values) ~= "table" or #names ~= #values or #names == 0 or spread and #spread ~= #names then
    error("plot.bars: names, values and spread must be lists of one length", 2)
  end
  local high = o.max or math.max(table.unpack(values))
  local low = o.min or math.min(0, table.unpack(values))
  if not o.file then
    local width, out = 0, { o.title ~= "" and o.title or nil }
    for _, name in ipairs(names) do width = math.max(width, utf8.len(name) or #name) end
    for i, v in ipairs(values) do
      local p = high > low and (v - low) / (high - low) or 0
      local n = math.floor(math.max(0, math.min(1, p)) * math.min(40, o.columns) + 0.5)
      out[#out + 1] = ("%s %s %s%s"):format(pad(names[i], width), ("█"):rep(n), number(v), spread and (" ± %.2g"):format(spread[i]) or "")
    end
    return table.concat(out, "\n")
  end
  local lines = {
    "unset key", "set style fill solid 0.8 noborder", "set boxwidth 0.7", "set grid y lc rgb '#e0e0e0'",
    ("set yrange [%.9g:%s]"):format(low, o.max and ("%.9g"):format(o.max) or "*"), ("set xrange [0.4:%g]"):format(#names + 0.6),
    "$data << EOD",
  }
  local tics = {}
  for i, v in ipairs(values) do
    lines[#lines + 1] = ("%d %.9g %.9g"):format(i, v, spread and spread[i] or 0)
    tics[i] = quoted(names[i]) .. " " .. i
  end
  lines[#lines + 1] = "EOD"
  lines[#lines + 1] = ("set xtics (%s) rotate by -30 noenhanced"):format(table.concat(tics, ", "))
  lines[#lines + 1] = "plot $data using 1:2 with boxes lc rgb '#2171b5', $data using 1:2:3 with yerrorbars pt 0 lc rgb '#08306b'"
  return draw(o, lines)
end

-- --- routings ---

-- The load of a routing, a layer's statistics, a tensor or a table, as shares that sum to one.
local function shares(name, i, v)
  local load = v
  if routing_of.is_routing(v) then load = v:load()
  elseif type(v) == "table" and v.load ~= nil and type(v.load) ~= "function" then load = v.load
  elseif type(v) == "table" and type(v.stats) == "function" then load = v:stats().load end
  if core.is_tensor(load) then load = load:totable() end
  if type(load) ~= "table" or #load == 0 then
    error(("plot.%s: entry %d must be a routing, a layer, its stats() or a list of loads, got a %s"):format(name, i, type(v)), 3)
  end
  local sum, out = 0, {}
  for e, n in ipairs(load) do
    if type(n) ~= "number" then error(("plot.%s: entry %d: load %d is no number"):format(name, i, e), 3) end
    sum = sum + n
  end
  for e, n in ipairs(load) do out[e] = sum > 0 and n / sum or 0.0 end
  return out
end

--- The share of every expert (down) over time (across): a list of routings, of layer:stats() or of loads.
function M.load_over_time(list, given)
  if type(list) ~= "table" then error("plot.load_over_time: argument 1 must be a list, got a " .. type(list), 2) end
  local columns = {}
  for t, v in ipairs(list) do columns[t] = shares("load_over_time", t, v) end
  if #columns == 0 then error("plot.load_over_time: argument 1 is an empty list", 2) end
  local rows = {}
  for e = 1, #columns[1] do
    rows[e] = {}
    for t, column in ipairs(columns) do rows[e][t] = column[e] or 0.0 end
  end
  return M.heatmap(rows, read("load_over_time", given, { title = "Share of the load", xlabel = "step", ylabel = "expert", min = 0 }))
end

--- The share of every expert (across) by layer (down): a model (its sparse layers' statistics), or a list as in load_over_time.
function M.load_by_layer(model, given)
  local rows = {}
  if type(model) == "table" and type(model.named_modules) == "function" then
    for _, m in model:named_modules() do
      if type(m) == "table" and m.decide and type(m.stats) == "function" then
        rows[#rows + 1] = shares("load_by_layer", #rows + 1, m)
      end
    end
    if #rows == 0 then error("plot.load_by_layer: the model has no sparse layer", 2) end
  elseif type(model) ~= "table" or model[1] == nil then
    error("plot.load_by_layer: argument 1 must be a model or a list, got "
      .. (type(model) == "table" and "an empty list" or "a " .. type(model)), 2)
  else
    for i, v in ipairs(model) do rows[i] = shares("load_by_layer", i, v) end
  end
  local most = 0
  for _, row in ipairs(rows) do most = math.max(most, #row) end
  for _, row in ipairs(rows) do
    for e = #row + 1, most do row[e] = 0.0 end -- layers may have different numbers of experts
  end
  return M.heatmap(rows, read("load_by_layer", given, { title = "Share of the load", xlabel = "expert", ylabel = "layer", min = 0 }))
end

--- How often two experts work on the same token, as the share of the rarer one's tokens: a routing, or counts [E, E].
function M.coactivation(routing, given)
  local counts = matrix("coactivation", routing_of.is_routing(routing) and routing:coactivation() or routing)
  if #counts ~= #counts[1] then
    error(("plot.coactivation: argument 1 must be square counts, got [%d, %d]"):format(#counts, #counts[1]), 2)
  end
  local rows = {}
  for i, row in ipairs(counts) do
    rows[i] = {}
    for j, n in ipairs(row) do
      local least = math.min(counts[i][i], counts[j] and counts[j][j] or 0)
      rows[i][j] = i ~= j and least > 0 and n / least or 0.0
    end
  end
  return M.heatmap(rows, read("coactivation", given, {
    title = "Experts of the same token", xlabel = "expert", ylabel = "expert", min = 0,
  }))
end

--- What share of each group's assignments (down) goes to which expert (across): counts of moe.inspect.specialisation.
-- ynames: the groups' names.
function M.specialisation(counts, given)
  local rows = {}
  for g, row in ipairs(matrix("specialisation", counts)) do rows[g] = shares("specialisation", g, row) end
  return M.heatmap(rows, read("specialisation", given, {
    title = "Which expert takes what", xlabel = "expert", ylabel = "group", min = 0,
  }))
end

return M
