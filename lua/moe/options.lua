-- What checks of option tables share.

local M = {}

-- Edit distance of short words, each change costing one.
local function distance(a, b)
  local row = {}
  for j = 0, #b do row[j] = j end
  for i = 1, #a do
    local diagonal = row[0]
    row[0] = i
    for j = 1, #b do
      local keep = diagonal + (a:byte(i) == b:byte(j) and 0 or 1)
      diagonal = row[j]
      row[j] = math.min(keep, row[j] + 1, row[j - 1] + 1)
    end
  end
  return row[#b]
end

--- " (did you mean 'top_k'?)" for the key of `known` that is nearest to `key`; "" when none is near.
function M.hint(key, known)
  if type(key) ~= "string" or #key > 60 then return "" end
  local best, least = nil, 1 + #key // 2
  for name in pairs(known) do
    local d = distance(key, name)
    if name:find(key, 1, true) or key:find(name, 1, true) then d = math.min(d, 2) end
    if d < least or (d == least and best and name < best) then best, least = name, d end
  end
  return best and (" (did you mean '%s'?)"):format(best) or ""
end

--- options, or an empty table for nil; raises at the level of the caller's caller for what is no table and for keys that
-- are not those of `known`. level: 3, as for `error`.
function M.check(fname, options, known, level)
  if options == nil then return {} end
  if type(options) ~= "table" then
    error(("%s: a table of options was wanted, got a %s"):format(fname, type(options)), level or 3)
  end
  for k in pairs(options) do
    if known[k] == nil then error(("%s: unknown option '%s'%s"):format(fname, tostring(k), M.hint(k, known)), level or 3) end
  end
  return options
end

return M
