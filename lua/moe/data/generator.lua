-- Random numbers that depend on a seed and a place alone: SplitMix64 (Steele, Lea and Flood 2014), one stream an example.

local Generator = {}
Generator.__index = Generator

local function mix(z)
  z = (z ~ (z >> 30)) * 0xbf58476d1ce4e5b9
  z = (z ~ (z >> 27)) * 0x94d049bb133111eb
  return z ~ (z >> 31)
end

-- The stream of example `place` under `seed`.
function Generator.new(seed, place)
  return setmetatable({ at = mix(mix(seed + 0x9e3779b97f4a7c15) + place * 0x9e3779b97f4a7c15) }, Generator)
end

local function bits(self)
  self.at = self.at + 0x9e3779b97f4a7c15
  return mix(self.at) >> 11
end

--- A number in [0, 1).
function Generator:number() return bits(self) * 0x1p-53 end

--- A whole number in first .. last.
function Generator:integer(first, last) return first + bits(self) % (last - first + 1) end

--- k different ones of 1 .. n, in random order.
function Generator:choose(n, k)
  local moved, out = {}, {}
  for i = 1, k do
    local j = self:integer(i, n)
    out[i] = moved[j] or j
    moved[j] = moved[i] or i
  end
  return out
end

--- k different ones of 1 .. #weights, one after the other in proportion to the weights of those that are left: the k
-- smallest of -log(u) / weight (Efraimidis and Spirakis 2006).
function Generator:choose_by(weights, k)
  local time, order = {}, {}
  for i, w in ipairs(weights) do time[i], order[i] = -math.log(1 - self:number()) / w, i end
  table.sort(order, function(a, b)
    if time[a] ~= time[b] then return time[a] < time[b] end
    return a < b
  end)
  return table.move(order, 1, k, 1, {})
end

return Generator
