-- Tables whose fields are modules, each loaded when it is first named.

-- lazy(t, paths): t[name] loads paths[name], a module or "module:field"; completers and pairs() see the names before
-- they are loaded.
return function(t, paths)
  return setmetatable(t, {
    __index = function(self, name)
      local path = paths[name]
      if not path then return nil end
      local file, field = path:match "^(.-):(.*)$"
      local value = require(file or path)
      if field then value = value[field] end
      rawset(self, name, value)
      return value
    end,
    __pairs = function(self)
      for name in pairs(paths) do local _ = self[name] end
      return next, self, nil
    end,
  })
end
