#!lua name=redismem_series
-- Version: 1
-- Adds what a process counted to the history of a minute and a day: these two hashes, and nothing else.
--
-- Functions (KEYS -> ARGV -> reply)
--   rm_count_v1  minute day | ttl_s of each, (name count) …
--                -> OK names: adds count to each name, in both
--
-- Complexity: O(names).
-- Storage: minute, day hashes name -> how often. Each expires ttl_s after what was last added to it. A value
--   that is no whole number, after a foreign hand, starts anew.
-- Derived keys: none.
-- Limits: 1 to 1,000 names a call, counts of 1 to 2^53.

-- part: check

-- check ---------------------------------------------------------------------------------------

-- names and counts in turns, as HINCRBY takes them; nil when an argument is not what it must be
local function pairs_of(args)
  if #args < 4 or #args > 2 + 2 * 1000 then return nil end
  local flat = {}
  for i = 3, #args, 2 do
    local count = whole(args[i + 1], 1, 2 ^ 53)
    if not count then return nil end
    flat[#flat + 1], flat[#flat + 2] = args[i], string.format('%.0f', count)
  end
  return flat
end

-- read ----------------------------------------------------------------------------------------

local function wrong_hash(keys)
  for _, key in ipairs(keys) do
    local wrong = wrong_type(key, 'hash')
    if wrong then return wrong end
  end
end

-- write: nothing below may raise ----------------------------------------------------------------

local function add(key, flat, ttl_s)
  for i = 1, #flat, 2 do
    local sum = redis.pcall('HINCRBY', key, flat[i], flat[i + 1])
    if type(sum) == 'table' then redis.call('HSET', key, flat[i], flat[i + 1]) end
  end
  redis.call('EXPIRE', key, string.format('%.0f', ttl_s))
end

local function count(keys, args)
  local minute, day = keys[1], keys[2]
  local minute_s, day_s = whole(args[1], 1, 1e9), whole(args[2], 1, 1e9)
  local flat = pairs_of(args)
  if not (day and minute_s and day_s and flat) then
    return misuse('rm_count minute day | ttl_s of each, at most 1,000 of (name count)')
  end
  local wrong = wrong_hash({ minute, day })
  if wrong then return wrong end

  add(minute, flat, minute_s)
  add(day, flat, day_s)
  return { 'OK', #flat / 2 }
end

redis.register_function('rm_count_v1', count)
