-- Digits of 5 x 7 points somewhere on a field of 8 x 10, under noise: a small stand-in for handwritten ones.
local moe = require "moe"

local GLYPHS <const> = {
  "01110 10001 10011 10101 11001 10001 01110", "00100 01100 00100 00100 00100 00100 01110",
  "01110 10001 00001 00110 01000 10000 11111", "11111 00010 00100 00010 00001 10001 01110",
  "00010 00110 01010 10010 11111 00010 00010", "11111 10000 11110 00001 00001 10001 01110",
  "00110 01000 10000 11110 10001 10001 01110", "11111 00001 00010 00100 01000 01000 01000",
  "01110 10001 10001 01110 10001 10001 01110", "01110 10001 10001 01111 00001 00010 01100",
}
local WIDTH <const>, HEIGHT <const> = 8, 10

local M = { inputs = WIDTH * HEIGHT, classes = 10 }

-- All places of all digits as rows [10 * places, inputs].
local rows, places = {}, (WIDTH - 4) * (HEIGHT - 6)
for _, glyph in ipairs(GLYPHS) do
  local lines = {}
  for line in glyph:gmatch "%d+" do lines[#lines + 1] = line end
  for dy = 0, HEIGHT - 7 do
    for dx = 0, WIDTH - 5 do
      local row = {}
      for i = 1, WIDTH * HEIGHT do row[i] = -0.3 end
      for y, line in ipairs(lines) do
        for x = 1, 5 do
          if line:sub(x, x) == "1" then row[(y - 1 + dy) * WIDTH + x + dx] = 1 end
        end
      end
      rows[#rows + 1] = row
    end
  end
end
local all = moe.tensor(rows)

--- n digits: x [n, inputs], y [n] classes from 1, drawn by moe.manual_seed's generator.
function M.draw(n, noise)
  local at = moe.randint(1, 10 * places, { n })
  return all:index_select(1, at) + moe.randn(n, M.inputs) * (noise or 0.6), (at - 1):floor_divide(places) + 1
end

return M
