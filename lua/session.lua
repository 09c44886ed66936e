#!lua name=redismem_session
-- Version: 1
-- Keeps what one owner's sessions are beside their messages, and queues their summaries. Changes no memory.
--
-- Functions (KEYS -> ARGV -> reply); fields: all of the hash, an array of names and values; a list
--   is JSON of strings; `lives`: for how many ms
--   rm_session_open_v1   session sessions later | prefix id now_ms ttl_ms usual_ttl_ms agent topics pins
--                        -> OPENED or JOINED lives fields: joining adds agent, topics and pins to what is
--                        there, and opens a closed one again; ttl_ms 0: the one it has, or the usual one. Another
--                        session that was not closed may have ended: the newest such gets its summary now
--   rm_session_said_v1   session sessions later | prefix id now_ms count asked agents
--                        -> MISSING | OK messages: count more, asked of them the user's; the summary follows in ten
--                        minutes
--   rm_session_set_v1    session | prefix id, (field value) … -> MISSING | OK lives fields: of active_topics, pins,
--                        loaded, shown; does not prolong its life
--   rm_session_close_v1  session later | prefix id now_ms
--                        -> MISSING | OK lives fields: the summary follows in a second
--   rm_session_ro_v1     session turns | memory_prefix id limit, fields …
--                        -> MISSING | OK lives fields, (id values) …: its newest messages, oldest first, each
--                        with the values of those fields; without superseded ones (no-writes)
--
-- Complexity: O(names in the lists); rm_session_ro O(limit).
-- Storage: session hash, with a TTL of ttl_ms that each message renews: opened_at, last_at, closed_at (epoch s),
--   ttl_ms, messages, asked (those of the user), agents, active_topics, pins (lists), loaded (JSON of [id, signal,
--   score]: what was loaded ahead), shown (list of ids in the latest context); sessions zset id -> last_at, TTL 90
--   days; turns: lua/write.lua; later: lua/jobs.lua. Messages are memories; their order is that of the turns.
-- Derived keys: prefix .. id, where the prefix is that of sessions; memory_prefix .. id.
-- Limits: 64 agents, 100 topics and 100 pins a session: the newest stay. 256 KiB a field that is set. 1,000
--   sessions an owner: of more the oldest end, so that whoever forgets the owner finds all of them by the zset.

-- part: check

local AGENTS, NAMES = 64, 100
local SESSIONS, SESSIONS_MS = 1000, 90 * 86400000
local DAY_MS, MOST_MS = 86400000, 1e11
-- ms until a summary is made: of a session that goes on, of one that was closed
local GOES_ON, CLOSED = 600000, 1000
-- sessions among which the newest that may have ended is looked for; surplus ones that one call removes
local OTHERS, SURPLUS = 10, 100
local BYTES = 262144
local SETTABLE = { active_topics = 'names', pins = 'names', loaded = 'json', shown = 'json' }

-- check ---------------------------------------------------------------------------------------

-- nil when the key is not that of the session, or the prefix names no owner
local function context_of(keys, args)
  local prefix, id = args[1] or '', args[2] or ''
  local tag = string.match(prefix, '{([^}]*)}')
  if not tag or id == '' or keys[1] ~= prefix .. id then return nil end
  return { key = keys[1], prefix = prefix, id = id, tag = tag, now_ms = whole(args[3], 1, 1e14) }
end

local function json_of(text)
  local ok, value = pcall(cjson.decode, text or '')
  return ok and type(value) == 'table' and value or nil
end

-- JSON of strings; nil for anything else
local function names_of(text)
  local names, count = json_of(text), 0
  if not names then return nil end
  for _, name in pairs(names) do
    count = count + 1
    if type(name) ~= 'string' then return nil end
  end
  return count == #names and names or nil
end

-- read ----------------------------------------------------------------------------------------

-- old names and new ones as JSON, each once, the new ones last; the last `most` of them
local function merged(old, new, most)
  local order, is_new = {}, {}
  for _, name in ipairs(new) do is_new[name] = true end
  for _, name in ipairs(old) do
    if not is_new[name] then order[#order + 1] = name end
  end
  for _, name in ipairs(new) do
    if is_new[name] then order[#order + 1] = name end
    is_new[name] = nil
  end
  if #order > most then order = { unpack(order, #order - most + 1) } end
  return #order > 0 and cjson.encode(order) or '[]'
end

local function seconds(now_ms)
  return string.format('%.3f', now_ms / 1000)
end

local function told(word, key)
  return { word, redis.call('PTTL', key), redis.call('HGETALL', key) }
end

-- write: nothing below may raise ----------------------------------------------------------------

local function queue_summary(ctx, later, id, delay_ms)
  redis.call('ZADD', later, 'LT', string.format('%.0f', ctx.now_ms + delay_ms), ctx.tag .. ' summary:session:' .. id)
end

local function prolong(ctx, sessions, ttl_ms)
  local now_s = seconds(ctx.now_ms)
  redis.call('HSET', ctx.key, 'last_at', now_s)
  redis.call('PEXPIRE', ctx.key, string.format('%.0f', ttl_ms))
  redis.call('ZADD', sessions, now_s, ctx.id)
  redis.call('PEXPIRE', sessions, string.format('%.0f', SESSIONS_MS))
  local surplus = math.min(SURPLUS, redis.call('ZCARD', sessions) - SESSIONS)
  for _, id in ipairs(surplus > 0 and redis.call('ZRANGE', sessions, 0, surplus - 1) or {}) do
    -- this one may seem old by a clock that is behind
    if id ~= ctx.id then
      redis.call('UNLINK', ctx.prefix .. id)
      redis.call('ZREM', sessions, id)
    end
  end
end

-- an agent that goes away without a close has no summary of the last minutes
local function summarise_another(ctx, sessions, later)
  for _, id in ipairs(redis.call('ZREVRANGE', sessions, 0, OTHERS - 1)) do
    local raw = id ~= ctx.id and redis.pcall('HMGET', ctx.prefix .. id, 'opened_at', 'closed_at') or {}
    if raw[1] and not raw[2] then return queue_summary(ctx, later, id, 0) end
  end
end

local function open(keys, args)
  local ctx, sessions, later = context_of(keys, args), keys[2], keys[3]
  local given_ms, usual_ms = whole(args[4], 0, MOST_MS), whole(args[5], 1, MOST_MS)
  local agent, topics, pins = args[6], names_of(args[7]), names_of(args[8])
  if not (ctx and ctx.now_ms and later and given_ms and usual_ms and topics and pins) then
    return misuse('rm_session_open session sessions later | prefix id now_ms ttl_ms usual_ttl_ms agent topics pins')
  end
  local wrong = wrong_type(ctx.key, 'hash') or wrong_type(sessions, 'zset') or wrong_type(later, 'zset')
  if wrong then return wrong end
  local old = redis.call('HMGET', ctx.key, 'opened_at', 'ttl_ms', 'agents', 'active_topics', 'pins')
  local ttl_ms = given_ms > 0 and given_ms or whole(old[2], 1, MOST_MS) or usual_ms

  redis.call('HSET', ctx.key, 'ttl_ms', string.format('%.0f', ttl_ms),
    'agents', merged(names_of(old[3]) or {}, agent ~= '' and { agent } or {}, AGENTS),
    'active_topics', merged(names_of(old[4]) or {}, topics, NAMES),
    'pins', merged(names_of(old[5]) or {}, pins, NAMES))
  redis.call('HDEL', ctx.key, 'closed_at')
  if not old[1] then
    redis.call('HSET', ctx.key, 'opened_at', seconds(ctx.now_ms), 'messages', 0, 'asked', 0,
      'loaded', '[]', 'shown', '[]')
  end
  prolong(ctx, sessions, ttl_ms)
  if not old[1] then summarise_another(ctx, sessions, later) end
  return told(old[1] and 'JOINED' or 'OPENED', ctx.key)
end

local function said(keys, args)
  local ctx, sessions, later = context_of(keys, args), keys[2], keys[3]
  local count, agents = whole(args[4], 0, 1000), names_of(args[6])
  local asked = count and whole(args[5], 0, count)
  if not (ctx and ctx.now_ms and later and asked and agents) then
    return misuse('rm_session_said session sessions later | prefix id now_ms count asked agents')
  end
  local wrong = wrong_type(ctx.key, 'hash') or wrong_type(sessions, 'zset') or wrong_type(later, 'zset')
  if wrong then return wrong end
  local old = redis.call('HMGET', ctx.key, 'opened_at', 'ttl_ms', 'messages', 'asked', 'agents')
  if not old[1] then return { 'MISSING' } end

  -- not HINCRBY, which raises where another hand wrote something else
  local messages = (whole(old[3], 0, 2 ^ 53) or 0) + count
  redis.call('HSET', ctx.key, 'messages', string.format('%.0f', messages),
    'asked', string.format('%.0f', (whole(old[4], 0, 2 ^ 53) or 0) + asked),
    'agents', merged(names_of(old[5]) or {}, agents, AGENTS))
  prolong(ctx, sessions, whole(old[2], 1, MOST_MS) or DAY_MS)
  queue_summary(ctx, later, ctx.id, GOES_ON)
  return { 'OK', messages }
end

local function set(keys, args)
  local ctx, flat = context_of(keys, args), {}
  if not ctx or #args % 2 == 1 or #args > 2 + 2 * 100 then
    return misuse('rm_session_set session | prefix id, (field value) …')
  end
  for i = 3, #args, 2 do
    local kind, value = SETTABLE[args[i]], args[i + 1]
    local names = names_of(value)
    if not kind or kind == 'names' and not names or #value > BYTES or not json_of(value) then
      return misuse('rm_session_set: active_topics, pins, loaded or shown, as JSON')
    end
    flat[#flat + 1], flat[#flat + 2] = args[i], kind == 'names' and merged({}, names, NAMES) or value
  end
  local wrong = wrong_type(ctx.key, 'hash')
  if wrong then return wrong end
  if redis.call('HEXISTS', ctx.key, 'opened_at') == 0 then return { 'MISSING' } end

  if #flat > 0 then redis.call('HSET', ctx.key, unpack(flat)) end
  return told('OK', ctx.key)
end

local function close(keys, args)
  local ctx, later = context_of(keys, args), keys[2]
  if not (ctx and ctx.now_ms and later) then return misuse('rm_session_close session later | prefix id now_ms') end
  local wrong = wrong_type(ctx.key, 'hash') or wrong_type(later, 'zset')
  if wrong then return wrong end
  if redis.call('HEXISTS', ctx.key, 'opened_at') == 0 then return { 'MISSING' } end

  redis.call('HSETNX', ctx.key, 'closed_at', seconds(ctx.now_ms))
  queue_summary(ctx, later, ctx.id, CLOSED)
  return told('OK', ctx.key)
end

-- functions -----------------------------------------------------------------------------------

local function read(keys, args)
  local session, turns, prefix, id = keys[1], keys[2], args[1], args[2]
  local limit = whole(args[3], 0, 200)
  if not (turns and limit) or #args > 3 + 100 then
    return misuse('rm_session_ro session turns | memory_prefix id limit, fields …')
  end
  local wrong = wrong_type(session, 'hash') or wrong_type(turns, 'hash')
  if wrong then return wrong end
  if redis.call('HEXISTS', session, 'opened_at') == 0 then return { 'MISSING' } end
  local reply, found = { 'OK', redis.call('PTTL', session), redis.call('HGETALL', session) }, {}
  local at = string.match(redis.call('HGET', turns, 't' .. id) or '', '^([^\31]+)\31')
  -- memories that other hands removed are turns still, and those of other types are no messages
  for _ = 1, 4 * limit + 100 do
    if not at or #found >= limit then break end
    local raw = redis.pcall('HMGET', prefix .. at, 'text', 'superseded_by', 'memory_type', unpack(args, 4))
    if raw[1] and not raw[2] and raw[3] == 'message' then
      found[#found + 1] = { id = at, values = { unpack(raw, 4, #args) } }
    end
    at = string.match(redis.call('HGET', turns, 'l' .. at) or '', '^([^\31]+)\31')
  end
  for i = #found, 1, -1 do reply[#reply + 1], reply[#reply + 2] = found[i].id, found[i].values end
  return reply
end

redis.register_function('rm_session_open_v1', open)
redis.register_function('rm_session_said_v1', said)
redis.register_function('rm_session_set_v1', set)
redis.register_function('rm_session_close_v1', close)
redis.register_function { function_name = 'rm_session_ro_v1', callback = read, flags = { 'no-writes' } }
