-- Part of several libraries (`-- part: check`): the check of arguments and of the types of keys.

local function misuse(text)
  return redis.error_reply('RMEM_USAGE ' .. text)
end

-- a whole number within bounds; nil for anything else, NaN included
local function whole(text, low, high)
  local number = tonumber(text or '')
  return number and number >= low and number <= high and number % 1 == 0 and number or nil
end

local function wrong_type(key, want)
  local got = redis.call('TYPE', key).ok
  if got ~= 'none' and got ~= want then
    return redis.error_reply('RMEM_TYPE ' .. key .. ' is a ' .. got .. ', not a ' .. want)
  end
end
