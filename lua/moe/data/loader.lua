-- What loaders of batches share: the call, and where they are.
--
-- A loader has next(self), fields = { name = least value } that say where it is, kind, and text for tostring.

local function fail(level, message, ...) error(message:format(...), level + 1) end

local Loader = {}
Loader.__index = Loader
Loader.__name = "moe.data.loader"
function Loader:__call() return self:next() end
function Loader:__tostring() return self.text end

-- The fields of a state and their least values; restore takes nothing else.
function Loader:state()
  local s = { kind = self.kind }
  for name in pairs(self.fields) do s[name] = self[name] end
  return s
end

function Loader:restore(s)
  if type(s) ~= "table" or s.kind ~= self.kind then
    fail(2, "restore: the state is not one of %s", self.text)
  end
  for name, least in pairs(self.fields) do
    if math.type(s[name]) ~= "integer" or s[name] < least then fail(2, "restore: the state's %s is %s", name, tostring(s[name])) end
  end
  for name in pairs(self.fields) do self[name] = s[name] end
end

return Loader
