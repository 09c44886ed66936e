#!lua name=redismem_limits
-- Version: 1
-- Grants requests to the holders of API keys, within the limit of each key, and changes nothing else.
--
-- Functions (KEYS -> ARGV -> reply)
--   rm_take_v1  rate | now_ms rate_per_s burst want -> granted wait_ms: up to `want` requests; where none is granted,
--               ms until there can be one
--
-- A bucket of `burst` tokens, filled with rate_per_s. From any moment on, callers together get burst + rate_per_s * t
--   at most, whatever their clocks: time is the latest that any of them told, and a bucket is full at most. A clock that
--   runs ahead holds back the others only until the key expires, by the clock of Redis, when the bucket is full anyhow.
-- Complexity: O(1).
-- Storage: rate string "<tokens> <now_ms>" of the last grant; expires when the bucket is full again.
-- Derived keys: none.
-- Limits: rates up to a million a second, as the burst.

-- part: check

-- check ---------------------------------------------------------------------------------------

local function between(text, low, high)
  local number = tonumber(text or '')
  return number and number >= low and number <= high and number or nil
end

-- read ----------------------------------------------------------------------------------------

-- tokens and moment; a bucket that is not there, or that another hand spoiled, is full
local function bucket(key, now_ms, rate, burst)
  local raw_tokens, raw_ms = string.match(redis.call('GET', key) or '', '^(%S+) (%d+)$')
  local tokens, at_ms = between(raw_tokens, 0, burst), whole(raw_ms, 1, 1e14)
  if not (tokens and at_ms) then return burst, now_ms end
  local latest_ms = math.max(at_ms, now_ms)
  return math.min(burst, tokens + (latest_ms - at_ms) * rate / 1000), latest_ms
end

-- write: nothing below may raise ----------------------------------------------------------------

local function take(keys, args)
  local key, now_ms, rate = keys[1], whole(args[1], 1, 1e14), between(args[2], 1e-4, 1e6)
  local burst, want = whole(args[3], 1, 1e6), whole(args[4], 1, 1e6)
  if not (key and now_ms and rate and burst and want) then
    return misuse('rm_take rate | now_ms rate_per_s burst want')
  end
  local wrong = wrong_type(key, 'string')
  if wrong then return wrong end
  local tokens, latest_ms = bucket(key, now_ms, rate, burst)
  local granted = math.min(want, math.floor(tokens))
  -- a refusal writes nothing, or those who ask again and again would keep the key from expiring
  if granted == 0 then return { 0, math.max(1, math.ceil((1 - tokens) * 1000 / rate)) } end
  tokens = tokens - granted
  redis.call('SET', key, string.format('%.17g %.0f', tokens, latest_ms), 'PX',
    string.format('%.0f', math.ceil((burst - tokens) * 1000 / rate)))
  return { granted, 0 }
end

redis.register_function('rm_take_v1', take)
