-- Starts busted on the interpreter that runs this file: the busted command itself often belongs to another Lua.
require "busted.runner"({ standalone = false })
