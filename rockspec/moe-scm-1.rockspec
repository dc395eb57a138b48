rockspec_format = "3.0"
package = "moe"
version = "scm-1"
source = {
  url = "git+https://github.com/moe-lua/moe.git",
  branch = "main",
}
description = {
  summary = "Tensors, automatic differentiation and mixtures of experts, on a C core",
  detailed = [[
Tensors with automatic differentiation, mixture-of-experts layers, routers and trainers as userdata
backed by a C core on OpenBLAS. Architectures, losses and schedules are composed in Lua.]],
  labels = { "machine-learning", "tensor", "autograd", "mixture-of-experts" },
}
dependencies = { "lua >= 5.4, < 5.5" }
test_dependencies = { "busted" }
-- The library alone: cblas.h lies in a folder of its own on several systems, and CMake finds it there.
external_dependencies = { OPENBLAS = { library = "openblas" } }
build = {
  type = "cmake",
  variables = {
    CMAKE_BUILD_TYPE = "Release", -- the back-end's --config means nothing to makefiles
    CMAKE_C_FLAGS = "$(CFLAGS)",
    LUA = "$(LUA)",
    LUA_INCDIR = "$(LUA_INCDIR)",
    LUA_LIBDIR = "$(LUA_LIBDIR)",
    LUALIB = "$(LUALIB)",
    LIBDIR = "$(LIBDIR)",
    LUADIR = "$(LUADIR)",
    OPENBLAS_INCDIR = "$(OPENBLAS_INCDIR)",
    OPENBLAS_LIBDIR = "$(OPENBLAS_LIBDIR)",
  },
}
test = { type = "busted", flags = { "--helper=spec/helper.lua" } }
