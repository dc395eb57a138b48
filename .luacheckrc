std = "lua54"
max_line_length = 140
exclude_files = { "build*", ".luarocks", "lua/moe/library", "spec/fixture" }
files["spec"] = { std = "+busted" }
files["rockspec"] = { std = "+rockspec" }
files[".busted"] = { std = "lua54" }
files["lua/moe/coredoc.lua"] = { max_line_length = false } -- one row a function
