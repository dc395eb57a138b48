-- Checkpoints: a directory of safetensors files and manifest.json, a list of them in the order of writing.
--
-- Order of a save: the tensors' file (aside, then renamed), the manifest (the same way), and only then the removal of what
-- the manifest no longer names. Killed at any moment, the manifest names files that are whole. Nothing read here is run.

local files = require("moe.core")._files

local M = {}

local FORMAT <const> = 1

local function manifest_path(dir) return dir .. "/manifest.json" end

-- A file name that a manifest may name: nothing outside of its directory.
local function is_plain(name)
  return type(name) == "string" and name:match "^step%-%d+[%.%d]*%.safetensors$" ~= nil
end

local function check(manifest)
  if type(manifest) ~= "table" or type(manifest.checkpoints) ~= "table" then return "it is no manifest of checkpoints" end
  if manifest.format ~= FORMAT then return ("its format is %s, this version reads %d"):format(tostring(manifest.format), FORMAT) end
  for i = 1, #manifest.checkpoints do
    local c = manifest.checkpoints[i]
    if type(c) ~= "table" or math.type(c.step) ~= "integer" or c.step < 0 or not is_plain(c.file) then
      return ("its entry %d is damaged"):format(i)
    end
  end
end

--- The manifest of a directory; false, message when there is none; nil, message when it cannot be used.
function M.manifest(dir)
  local path = manifest_path(dir)
  if files.kind(path) == nil then return false, ("%s: no checkpoint there"):format(dir) end
  local text, message = files.read(path, 1 << 26)
  if not text then return nil, message end
  local manifest, wrong = files.json_decode(text)
  wrong = wrong or check(manifest)
  if wrong then return nil, ("%s: %s"):format(path, wrong) end
  return manifest
end

-- Removes checkpoints and half-written files that the manifest does not name.
local function sweep(dir, manifest)
  local named = {}
  for _, c in ipairs(manifest.checkpoints) do named[c.file] = true end
  for _, name in ipairs(files.list(dir) or {}) do
    local stem = name:match "^(.-)%.tmp%-%d+%-%d+$"
    local ours = stem and (is_plain(stem) or stem == "manifest.json") or is_plain(name) and not named[name]
    if ours then files.remove(dir .. "/" .. name) end
  end
end

--- Adds a checkpoint to dir: tensors by name, and an entry (JSON values) with its step; keeps the `keep` newest ones.
-- Returns the path of the tensors' file, or nil, message.
function M.save(dir, tensors, entry, keep)
  local ok, message = files.make_dir(dir)
  if not ok then return nil, message end
  local manifest
  manifest, message = M.manifest(dir)
  if manifest == nil then return nil, message end
  manifest = manifest or { format = FORMAT, checkpoints = {} }
  local used = {}
  for _, c in ipairs(manifest.checkpoints) do used[c.file] = true end
  -- a file that the manifest names is never written over: its entry would no longer fit
  local name, again = ("step-%08d.safetensors"):format(entry.step), 1
  while used[name] do
    again = again + 1
    name = ("step-%08d.%d.safetensors"):format(entry.step, again)
  end
  entry.file = name
  table.insert(manifest.checkpoints, entry)
  while #manifest.checkpoints > keep do table.remove(manifest.checkpoints, 1) end
  local text = files.json_encode(manifest) -- may raise for what is not JSON: before anything is written
  ok, message = files.save(dir .. "/" .. name, tensors)
  if not ok then return nil, message end
  ok, message = files.write(manifest_path(dir), text .. "\n")
  if not ok then return nil, message end
  sweep(dir, manifest)
  return dir .. "/" .. name
end

--- The newest checkpoint of dir, or that of a step: entry, tensors. false, message when there is none; nil, message when
-- it cannot be read.
function M.load(dir, step)
  local manifest, message = M.manifest(dir)
  if not manifest then return manifest, message end
  local list = manifest.checkpoints
  local entry
  for i = #list, 1, -1 do
    if step == nil or list[i].step == step then
      entry = list[i]
      break
    end
  end
  if not entry then return false, ("%s: no checkpoint%s there"):format(dir, step and (" of step %d"):format(step) or "") end
  local tensors
  tensors, message = files.load(dir .. "/" .. entry.file)
  if not tensors then return nil, message end
  return entry, tensors
end

return M
