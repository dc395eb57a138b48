-- The programs a user runs first, small: they run to their end and say what they promise.
local moe = require "moe"

-- Runs a shell command with the paths of this run; its output, and whether it succeeded.
local function run(command)
  local pipe = assert(io.popen(("LUA_PATH='%s' LUA_CPATH='%s' %s 2>&1"):format(package.path, package.cpath, command)))
  local text = pipe:read "a"
  return text, pipe:close()
end

local function lua(arguments) return run("lua5.4 " .. arguments) end

describe("examples", function()
  it("train_lm.lua trains, shows what the experts do, saves, resumes; sample.lua reads it", function()
    local dir = os.tmpname()
    os.remove(dir)
    finally(function() os.execute("rm -rf '" .. dir .. "'") end)
    local small = "--layers 2 --d-model 32 --heads 2 --hidden 32 --experts 4 --block 32 --batch 8 --sample 40 --eval-every 20"
    local text, ok = lua(("examples/train_lm.lua %s --steps 20 --save-every 10 --save '%s'"):format(small, dir))
    assert.truthy(ok, text)
    assert.matches("held%-out loss %d", text)
    assert.matches("Which experts of layer %d took which kind of text", text)
    assert.matches("A sample:", text)
    text, ok = lua(("examples/train_lm.lua %s --steps 30 --resume --save '%s'"):format(small, dir))
    assert.truthy(ok, text)
    text, ok = lua(("examples/sample.lua --load '%s' --prompt 'local ' --tokens 20 --seed 1"):format(dir))
    assert.truthy(ok, text)
    assert.truthy(text:find("local ", 1, true) and #text > 20, text)
  end)

  it("train_lm.lua takes a file and a dense model, and refuses what it does not know", function()
    local text, ok = lua("examples/train_lm.lua --data README.md --arch dense --layers 1 --d-model 16 --heads 1 --hidden 16 "
      .. "--block 16 --batch 4 --steps 5 --sample 10")
    assert.truthy(ok, text)
    text, ok = lua "examples/train_lm.lua --stepz 5"
    assert.falsy(ok)
    assert.matches("stepz", text)
  end)

  it("train_lm.lua takes mixers and patterns of them; sample.lua stops at a text", function()
    local dir = os.tmpname()
    os.remove(dir)
    finally(function() os.execute("rm -rf '" .. dir .. "'") end)
    local small = "--d-model 16 --heads 2 --hidden 16 --experts 2 --block 16 --batch 2 --steps 20 --sample 30 --data README.md"
    local text, ok = lua(("examples/train_lm.lua %s --layers 5 --arch mamba,mamba2,attention,rwkv7 --ffn none,moe --save '%s'"):format(
      small, dir))
    assert.truthy(ok, text)
    assert.matches("held%-out loss %d", text)
    assert.matches("Which experts of layer %d took which kind of text", text)
    local all
    all, ok = lua(("examples/sample.lua --load '%s' --prompt 'the ' --tokens 40 --min-p 0.01 --repetition-penalty 1.1"):format(dir))
    assert.truthy(ok, all)
    assert.equal("the ", all:sub(1, 4))
    local stop = all:match("%w", 15)
    text, ok = lua(("examples/sample.lua --load '%s' --prompt 'the ' --tokens 40 --min-p 0.01 --repetition-penalty 1.1 --stop '%s'"):format(
      dir, stop))
    assert.truthy(ok, text)
    assert.equal(all:sub(1, all:find(stop, 5, true) - 1) .. "\n", text)
    text, ok = lua("examples/train_lm.lua --arch mamba,atention " .. small)
    assert.falsy(ok)
    assert.matches("did you mean 'attention'", text)
  end)

  it("synthetic.lua trains on a task and tests at other lengths", function()
    local text, ok = lua("examples/synthetic.lua --task induction_heads --arch mamba --seq-len 10 --test-lengths 10,20 --steps 10 "
      .. "--batch 4 --d-model 16 --ffn none")
    assert.truthy(ok, text)
    assert.matches("step +10 +loss %d.*length +10 +right.*length +20 +right", text)
    text, ok = lua "examples/synthetic.lua --task mqar --num-kv-pair 3"
    assert.falsy(ok)
    assert.matches("did you mean 'num_kv_pairs'", text)
  end)

  it("custom_router.lua trains through a router of under 20 lines", function()
    local text, ok = lua "examples/custom_router.lua"
    assert.truthy(ok, text)
    local first, last = text:match "step%s+1%s+loss ([%d.]+)", text:match "step%s+500%s+loss ([%d.]+)"
    assert.truthy(tonumber(last) < tonumber(first) / 10, text)
    local lines = 0
    local source = io.open("examples/custom_router.lua"):read "a"
    for _ in source:match("(local function cosine_router.-\nend\n)"):gmatch "\n" do lines = lines + 1 end
    assert.truthy(lines < 20)
  end)

  it("recipes.lua lists, shows, runs and compares", function()
    local text, ok = lua "examples/recipes.lua"
    assert.truthy(ok, text)
    for _, name in ipairs(moe.recipe.names()) do assert.truthy(text:find("\n" .. name, 1, true) or text:find(name, 1, true) == 1, name) end
    text, ok = lua "examples/recipes.lua show deepseek_moe"
    assert.truthy(ok, text)
    assert.matches("Outcome: ", text)
    local small = " --steps 4 --d_model 16 --num_heads 2 --seq_len 16 --batch_size 2 --intermediate_size 8 --num_experts 4"
    text, ok = lua("examples/recipes.lua run topk" .. small)
    assert.truthy(ok, text)
    assert.matches("held%-out loss %d", text)
    assert.matches("share of the load over the training\n1 |", text)
    text, ok = lua("examples/recipes.lua compare dense topk --seeds 1,2" .. small)
    assert.truthy(ok, text)
    assert.matches("topk +%d%.%d+ %+%- %d%.%d+ +%d+ +%d+", text)
    text, ok = lua "examples/recipes.lua run nothing"
    assert.falsy(ok)
    assert.matches("there is no recipe 'nothing'", text)
  end)

  it("pictures.lua draws the pictures of the README", function()
    if not os.execute "gnuplot --version >/dev/null 2>&1" then return pending "gnuplot is not installed" end
    local dir = os.tmpname()
    os.remove(dir)
    finally(function() os.execute("rm -rf '" .. dir .. "'") end)
    local text, ok = run(("MOE_STEPS=4 lua5.4 examples/pictures.lua '%s'"):format(dir))
    assert.truthy(ok, text)
    for _, name in ipairs { "load.svg", "specialisation.svg" } do
      local file = assert(io.open(dir .. "/" .. name))
      assert.matches("</svg>", file:read "a")
      file:close()
    end
  end)

  it("embed: a C host with two threads, a state each", function()
    local core = assert(package.searchpath("moe.core", package.cpath))
    local program = core:gsub("moe/core%.%w+$", "examples/embed/embed")
    local file = io.open(program)
    if not file then return pending "embed is not built (cmake -DMOE_BUILD_EMBED=ON)" end
    file:close()
    local text, ok = run("'" .. program .. "'")
    assert.truthy(ok, text)
    local a, b = text:match "thread 1: f%(0.25%) = ([-%d.]+)%s+thread 2: f%(0.75%) = ([-%d.]+)"
    assert.truthy(math.abs(a - 1) < 0.2 and math.abs(b + 1) < 0.2, text) -- the script learns sin(2 pi x)
  end)

  it("say where a GPU would be needed", function()
    assert.error_matches(function() moe.zeros(2, { device = "cuda" }) end, "zeros: device 'cuda' is not available")
    assert.error_matches(function() moe.zeros(2):to "cuda:1" end, "to: 'cuda:1' is neither a type nor a device that is there")
  end)
end)
