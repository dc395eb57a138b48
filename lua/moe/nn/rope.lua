-- Rotary embeddings for longer contexts, with the fields of a Hugging Face configuration.

local M = {}

local function fail(text, ...) error("rope_scaling: " .. text:format(...), 3) end

local FIELDS <const> = { "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor",
  "low_freq_factor", "high_freq_factor" }

local function grown(factor, by) return factor <= 1 and 1 or 0.1 * by * math.log(factor) + 1 end

--- A table { rope_type = "linear" | "ntk" | "dynamic" | "yarn" | "llama3", factor =, original_max_position_embeddings =, ... } as
-- the text that moe.rope and moe.nn.attention take (`scaling`, `rope_scaling`); nil and "default" give nil, a text itself. The
-- second result is a factor of the scores: (0.1 mscale_all_dim log factor + 1)^2 for yarn with mscale_all_dim, as DeepSeek's
-- latent attention has it, else 1. yarn: Peng et al. 2023 (arXiv 2309.00071, section 3).
function M.scaling(given)
  if given == nil or type(given) == "string" then return given, 1 end
  if type(given) ~= "table" then fail("takes a table or a string, got a %s", type(given)) end
  local kind = given.rope_type or given.type
  if kind == "default" then return nil, 1 end
  local o, known, scores = {}, { rope_type = true, type = true, mscale = true, mscale_all_dim = true, rope_theta = true }, 1
  for _, name in ipairs(FIELDS) do known[name], o[name] = true, given[name] end
  for name in pairs(given) do
    if not known[name] then fail("unknown field '%s'", tostring(name)) end
  end
  if kind == "yarn" and given.factor then
    local all = given.mscale_all_dim
    if all and all ~= 0 then scores = grown(given.factor, all) ^ 2 end
    if not o.attention_factor and given.mscale and all and given.mscale ~= 0 and all ~= 0 then
      o.attention_factor = grown(given.factor, given.mscale) / grown(given.factor, all)
    end
  end
  local parts = {}
  for _, name in ipairs(FIELDS) do
    if o[name] then parts[#parts + 1] = ("%s=%.17g"):format(name, o[name]) end
  end
  return ("%s(%s)"):format(tostring(kind), table.concat(parts, ", ")), scores
end

return M
