-- Small groups by name: permutations "s5", even ones "a5", counting "z60", and products "a4xz5"; elements from 1, 1 being
-- the identity.

local M = {}

local function permutations(n)
  local out, used, now = {}, {}, {}
  local function extend(i)
    if i > n then
      out[#out + 1] = { table.unpack(now) }
      return
    end
    for v = 1, n do
      if not used[v] then
        used[v], now[i] = true, v
        extend(i + 1)
        used[v] = false
      end
    end
  end
  extend(1)
  return out
end

local function even(p)
  local inversions = 0
  for i = 1, #p do
    for j = i + 1, #p do
      if p[i] > p[j] then inversions = inversions + 1 end
    end
  end
  return inversions % 2 == 0
end

-- In the order of words, so that the identity comes first.
local function of_permutations(n, keep)
  local elements, number = {}, {}
  for _, p in ipairs(permutations(n)) do
    if keep(p) then
      elements[#elements + 1] = p
      number[table.concat(p)] = #elements
    end
  end
  return { size = #elements, elements = elements, product = function(a, b)
    local out, p, q = {}, elements[a], elements[b]
    for i = 1, n do out[i] = p[q[i]] end
    return number[table.concat(out)]
  end }
end

local function one(name)
  local kind, n = name:match "^([saz])(%d+)$"
  n = n and math.tointeger(tonumber(n))
  if not n then return nil end
  if kind == "z" and n >= 1 and n <= 10000 then
    return { size = n, product = function(a, b) return (a + b - 2) % n + 1 end }
  elseif (kind == "s" or kind == "a") and n >= 1 and n <= 6 then
    return of_permutations(n, kind == "a" and even or function() return true end)
  end
end

--- { size =, product(a, b) -> a b: of permutations first b, then a }; nil for a name that is none.
function M.group(name)
  local parts = {}
  for part in (name .. "x"):gmatch "(.-)x" do
    local group = one(part)
    if not group then return nil end
    parts[#parts + 1] = group
  end
  local all = parts[1]
  for i = 2, #parts do
    local left, right = all, parts[i]
    all = { size = left.size * right.size, product = function(a, b)
      local m = right.size
      return (left.product((a - 1) // m + 1, (b - 1) // m + 1) - 1) * m + right.product((a - 1) % m + 1, (b - 1) % m + 1)
    end }
  end
  return all
end

return M
