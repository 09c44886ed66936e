#!lua name=redismem_idempotency
-- Version: 1
-- Keeps the replies to requests that carry an Idempotency-Key, and changes nothing else.
--
-- Functions (KEYS -> ARGV -> reply)
--   rm_claim_v1     replies | name fingerprint token ttl_ms -> CLAIMED: the caller answers the request, then calls one of the
--                   others | BUSY: somebody answers it now | OTHER: the name stands for another request | DONE reply
--   rm_answered_v1  replies | name token reply ttl_ms -> OK | GONE: the claim has expired, or the owner was forgotten
--   rm_released_v1  replies | name token -> OK | GONE: the request was not answered; it may be claimed again
--
-- Complexity: O(1), plus the length of the reply.
-- Storage: replies hash: name -> "<fingerprint> <token>" while it is answered, then "<fingerprint>=<reply>"; each field has
--   a TTL. It goes with its owner (rm_forget).
-- Derived keys: none.
-- Limits: names, fingerprints and tokens are hexadecimal.

-- part: check

-- read ----------------------------------------------------------------------------------------

local function is_hex(text)
  return text and string.find(text, '^%x+$') ~= nil
end

-- whether the claim of this token stands; with it the fingerprint
local function claimed(replies, name, token)
  local fingerprint, holder = string.match(redis.call('HGET', replies, name) or '', '^(%x+) (%x+)$')
  return holder == token, fingerprint
end

-- write: nothing below may raise ----------------------------------------------------------------

local function keep(replies, name, value, ttl_ms)
  redis.call('HSET', replies, name, value)
  redis.call('HPEXPIRE', replies, string.format('%.0f', ttl_ms), 'FIELDS', 1, name)
end

local function claim(keys, args)
  local replies, name, fingerprint, token, ttl_ms = keys[1], args[1], args[2], args[3], whole(args[4], 1, 1e13)
  if not (replies and is_hex(name) and is_hex(fingerprint) and is_hex(token) and ttl_ms) then
    return misuse('rm_claim replies | name fingerprint token ttl_ms')
  end
  local wrong = wrong_type(replies, 'hash')
  if wrong then return wrong end
  local before = redis.call('HGET', replies, name)
  if not before then
    keep(replies, name, fingerprint .. ' ' .. token, ttl_ms)
    return { 'CLAIMED' }
  end
  local of, mark = string.match(before, '^(%x+)([ =])')
  if of ~= fingerprint then return { 'OTHER' } end
  if mark == ' ' then return { 'BUSY' } end
  return { 'DONE', string.sub(before, #of + 2) }
end

local function answered(keys, args)
  local replies, name, token, reply, ttl_ms = keys[1], args[1], args[2], args[3], whole(args[4], 1, 1e13)
  if not (replies and is_hex(name) and is_hex(token) and ttl_ms) then
    return misuse('rm_answered replies | name token reply ttl_ms')
  end
  local wrong = wrong_type(replies, 'hash')
  if wrong then return wrong end
  local stands, fingerprint = claimed(replies, name, token)
  if not stands then return 'GONE' end
  keep(replies, name, fingerprint .. '=' .. reply, ttl_ms)
  return 'OK'
end

local function released(keys, args)
  local replies, name, token = keys[1], args[1], args[2]
  if not (replies and is_hex(name) and is_hex(token)) then return misuse('rm_released replies | name token') end
  local wrong = wrong_type(replies, 'hash')
  if wrong then return wrong end
  if not claimed(replies, name, token) then return 'GONE' end
  redis.call('HDEL', replies, name)
  return 'OK'
end

redis.register_function('rm_claim_v1', claim)
redis.register_function('rm_answered_v1', answered)
redis.register_function('rm_released_v1', released)
