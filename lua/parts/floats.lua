-- Part of several libraries (`-- part: floats`): vectors as a vector set takes them.

-- FLOAT16 bytes as FLOAT32 bytes; each of the 65,536 numbers is computed once
local floats
local function float32_of(known, pair)
  local low, high = string.byte(pair, 1, 2)
  local exponent, mantissa = math.floor(high / 4) % 32, high % 4 * 256 + low
  local number = exponent == 0 and mantissa * 2 ^ -24 or (1 + mantissa / 1024) * 2 ^ (exponent - 15)
  known[pair] = struct.pack('<f', high >= 128 and -number or number)
  return known[pair]
end

local function float32(raw)
  floats = floats or setmetatable({}, { __index = float32_of })
  return (string.gsub(raw, '..', floats))
end
