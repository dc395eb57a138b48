--- Files: safetensors and JSON. Misuse raises; a file that cannot be read or written gives nil, message.
--
--   moe.io.save("a.safetensors", { weight = w }, { note = "text" })    -> true
--   moe.io.load("a.safetensors", { names = { "weight" } })             -> { weight = tensor }, metadata
--   moe.io.inspect("a.safetensors")   -> { weight = { dtype =, shape =, bytes = } }, metadata; reads the header alone
--
-- A file is written aside and renamed into place, so that neither a kill nor a full disk harms what was there; the
-- same tensors give the same bytes.

local low = require("moe.core")._files

return {
  save = low.save,
  load = low.load,
  inspect = low.inspect,
  json_encode = low.json_encode,
  json_decode = low.json_decode,
  read = low.read,
  write = low.write,
  list = low.list,
  make_dir = low.make_dir,
  remove = low.remove,
  kind = low.kind,
}
