-- Pictures as text, and as files where gnuplot is installed.
local helper = require "spec.helper"
local moe = require "moe"
local plot = moe.plot

local has_gnuplot = os.execute "gnuplot --version >/dev/null 2>&1"

local function content(path)
  local file = assert(io.open(path, "rb"))
  local text = file:read "a"
  file:close()
  return text
end

describe("moe.plot", function()
  it("shades numbers by their place in the range", function()
    local text = plot.heatmap({ { 0, 0.2, 0.4 }, { 0.6, 0.8, 1 } }, { title = "t", ynames = { "a", "b" }, xlabel = "step" })
    assert.equal("t\na | ░▒|\nb |▓██|\n   0 to 1, across: step", text)
    assert.matches("|███|", plot.heatmap({ { 1, 1, 1 } }, { min = 0 }))
    -- many columns become means of neighbours
    local wide = {}
    for i = 1, 100 do wide[i] = i > 50 and 1 or 0 end
    assert.matches("|     █████|", plot.heatmap({ wide }, { columns = 10 }))
  end)

  it("draws curves and bars as text", function()
    local text = plot.lines { { name = "loss", y = { 8, 4, 2, 1 } }, { name = "b", y = { 1, 1, 1, 8 } } }
    assert.matches("loss █▄▂▁ 1", text)
    assert.matches("b    ▁▁▁█ 8", text)
    assert.equal("one ████ 2 ± 0.5\ntwo ██ 1 ± 0.1", plot.bars({ "one", "two" }, { 2, 1 }, { 0.5, 0.1 }, { columns = 4 }))
  end)

  it("shows what routers did", function()
    local r = moe.routing.topk(moe.tensor({ { 1, 2 }, { 1, 2 }, { 1, 3 } }, { dtype = "i64" }), nil, 4)
    local over = plot.load_over_time { r, r, { 0, 0, 0, 6 }, { load = { 6, 0, 0, 0 } } }
    assert.matches("4 |  █ |", over) -- expert 4 in the third step alone
    assert.matches("1 |▒▒ █|", over)
    local co = plot.coactivation(r)
    assert.matches("1 | ██ |", co)
    local counts = moe.inspect.specialisation(r, moe.tensor({ 1, 1, 2 }, { dtype = "i64" }), 2)
    assert.matches("vowels |██  |", (plot.specialisation(counts, { ynames = { "vowels", "rest" } })))
    local layer = moe.layer { d_model = 4, num_experts = 4, experts = moe.experts.mlp { intermediate_size = 4 }, force = "uniform" }
    layer(moe.randn(8, 4))
    local model = moe.nn.sequential { moe.nn.linear(4, 4), layer }
    assert.matches("1 |████|", plot.load_by_layer(model))
    assert.matches("1 |████|", plot.load_by_layer { layer:stats() })
  end)

  it("writes SVG and PNG", function()
    if not has_gnuplot then return pending "gnuplot is not installed" end
    local base = os.tmpname()
    local svg, png = base .. ".svg", base .. ".png"
    assert.is_true(plot.heatmap(moe.rand(4, 6), { file = svg, title = "it's \"so\" & <so>", xnames = { "a", "b" } }))
    assert.matches("<svg", content(svg))
    assert.is_truthy(content(svg):find("&amp; &lt;so", 1, true))
    assert.is_true(plot.lines({ { name = "x", y = { 1, 2, 1 / 0, 3 }, spread = { 0.1, 0.1, 0.1, 0.1 } } }, { file = png }))
    assert.equal("\x89PNG", content(png):sub(1, 4))
    assert.is_true(plot.bars({ "a", "b" }, { 1, 2 }, nil, { file = svg }))
    assert.is_true(plot.load_over_time({ { 1, 2 }, { 2, 1 } }, { file = svg }))
    assert.is_true(plot.coactivation(moe.tensor { { 2, 1 }, { 1, 2 } }, { file = svg }))
    assert.is_true(plot.specialisation(moe.tensor { { 2, 1 }, { 1, 2 } }, { file = svg, ynames = { "x", "y" } }))
    for _, path in ipairs { base, svg, png } do os.remove(path) end
  end)

  it("answers nil and a message for files that cannot be written, and names bad arguments", function()
    local ok, message = plot.heatmap({ { 1 } }, { file = "/nowhere/at/all.svg" })
    assert.is_nil(ok)
    assert.matches("/nowhere/at/all.svg", message)
    local cases = {
      { "must end in .svg or .png, got 'a.gif'", function() plot.heatmap({ { 1 } }, { file = "a.gif" }) end },
      { "row 2 has not the 2 columns", function() plot.heatmap { { 1, 2 }, { 1 } } end },
      { "must be a tensor or a table of %[rows, columns%], got %[3%]", function() plot.heatmap(moe.ones(3)) end },
      { "unknown option 'titel' %(did you mean 'title'", function() plot.heatmap({ { 1 } }, { titel = "x" }) end },
      { "entry 1 of argument 1 is not of the form", function() plot.lines { { x = { 1 } } } end },
      { "must be lists of one length", function() plot.bars({ "a" }, { 1, 2 }) end },
      { "entry 2 must be a routing", function() plot.load_over_time { { 1, 2 }, 3 } end },
    }
    for _, case in ipairs(cases) do assert.matches(case[1], helper.error_of(case[2])) end
  end)
end)
