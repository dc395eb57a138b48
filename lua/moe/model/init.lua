-- moe.model: whole models, built from options.

return {
  lm = require "moe.model.lm",
  block = require "moe.model.block",
}
