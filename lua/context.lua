#!lua name=redismem_context
-- Version: 1
-- Reads what the context of a conversation is made from, besides searches, in one round trip. Writes nothing.
--
-- Functions (KEYS -> ARGV -> reply); all are no-writes, so replicas may run them
--   rm_open_ro_v1    meta profile ids sessions session turns | prefix summary_prefix session_prefix cluster_prefix session_id
--                    newest last_after_s fields (parted by blanks)
--                    -> generation, session, last, topics, important ids (JSON), newest ids, said ids, memories.
--                    session: fields …, empty where there is none. last: id last_at summary sources shown (JSON both) of
--                    the newest other session with a message after last_after_s, preferably one that has a summary.
--                    topics: number words witnesses (JSON both) summary sources of each active topic of the session.
--                    important: those of the profile. said: the session's last messages. memories: id, fields of those
--                    that the others (but said) name and that were not superseded
--   rm_around_ro_v1  turns similar | prefix fields (parted by blanks), ids …
--                    -> (near related) an id, then memories as above. near: ids of the two turns before and after
--                    it in its session; related: ids of its nearest memories
--   rm_near_topics_ro_v1  meta centroids | embedder cluster_prefix count vector32 -> (number cosine reach) …, nearest first; none on
--                    a server without vector sets
--
-- Complexity: O(memories named): about 5 us each. Storage: see lua/session.lua, lua/derive.lua, lua/write.lua.
-- Derived keys: prefix .. id, summary_prefix .. name, session_prefix .. id, cluster_prefix .. number.
-- Limits: 6 sessions looked at for the last one, 300 memories a call, 8 active topics, 20 messages said.

local SESSIONS = 6
local MEMORIES = 300
local TOPICS = 8
local SAID = 20
-- memories that are read: pins, those loaded for a session, those of the last session, others
local PINS, LOADED, LAST, NAMED = 100, 30, 20, 60

-- part: check
-- part: derived
-- part: shown

local function split(names)
  local fields = {}
  for name in string.gmatch(names or '', '%S+') do fields[#fields + 1] = name end
  return fields
end

-- collects memories that are there and not superseded, each once
local function collector(prefix, fields)
  local taken, flat, count, at = {}, {}, 0, 0
  for i, name in ipairs(fields) do
    if name == 'superseded_by' then at = i end
  end
  return flat, function(ids, most)
    for i = 1, math.min(#ids, most) do
      local id = type(ids[i]) == 'table' and ids[i][1] or ids[i]
      if type(id) == 'string' and not taken[id] and count < MEMORIES then
        taken[id] = true
        local values = redis.pcall('HMGET', prefix .. id, 'text', unpack(fields))
        if not values.err and values[1] and not (at > 0 and values[at + 1]) then
          table.remove(values, 1)
          flat[#flat + 1], flat[#flat + 2] = id, values
          count = count + 1
        end
      end
    end
  end
end

-- the last other session, and what its summary says
local function last_session(keys, args)
  local sessions, own, after_s, found = keys[4], args[5], tonumber(args[7]) or math.huge, nil
  local rows = redis.pcall('ZREVRANGE', sessions, 0, SESSIONS - 1, 'WITHSCORES')
  for i = 1, rows.err and 0 or #rows, 2 do
    local id, at_s = rows[i], tonumber(rows[i + 1])
    if id ~= own and at_s > after_s then
      local told = fields_of(args[2] .. 'session:' .. id)
      if not is_true(args[1], told.sources, told.digests) then told = {} end
      local shown = redis.pcall('HGET', args[3] .. id, 'shown')
      local row = { id, rows[i + 1], told.text or '', told.sources or '[]', type(shown) == 'string' and shown or '[]' }
      if told.text then return row end
      -- one in which nothing was said hides none
      if redis.pcall('HGET', args[3] .. id, 'messages') ~= '0' then found = found or row end
    end
  end
  return found or {}
end

local function topics_of(args, session)
  local flat, prefix = {}, args[1]
  for i, number in ipairs(decoded(session.active_topics)) do
    if i > TOPICS then break end
    if type(number) == 'string' and string.match(number, '^%d+$') then
      local words, witnesses = label_words(prefix, args[4] .. number)
      local told = fields_of(args[2] .. 'topic:' .. number)
      if not is_true(prefix, told.sources, told.digests) then told = {} end
      if #words > 0 then
        local row = { number, cjson.encode(words), cjson.encode(witnesses), told.text or '', told.sources or '[]' }
        for _, item in ipairs(row) do
          flat[#flat + 1] = item
        end
      end
    end
  end
  return flat
end

-- the place of a turn in its session: ids before and after it
local function beside(turns, id)
  local raw = redis.pcall('HGET', turns, 'l' .. id)
  return string.match(type(raw) == 'string' and raw or '', '^([^\31]*)\31([^\31]*)\31')
end

-- ids of the last turns of a session, newest first
local function said_in(turns, prefix, session)
  local tail, found = session ~= '' and redis.pcall('HGET', turns, 't' .. session), {}
  local id = string.match(type(tail) == 'string' and tail or '', '^([^\31]*)\31')
  for _ = 1, 4 * SAID do
    if not id or id == '' or #found == SAID then break end
    -- what else was stored in the session was not said
    if redis.pcall('HGET', prefix .. id, 'memory_type') == 'message' then found[#found + 1] = id end
    id = beside(turns, id)
  end
  return found
end

local function open(keys, args)
  local newest_count = whole(args[6], 0, 100)
  if not (keys[6] and newest_count and args[8]) then return misuse('rm_open_ro meta profile ids sessions session … | …') end
  local prefix = args[1]
  local memories, take = collector(prefix, split(args[8]))
  local important = redis.pcall('HGET', keys[2], 'important_memory_ids')
  if type(important) ~= 'string' then important = '[]' end
  local session = args[5] ~= '' and fields_of(keys[5]) or {}
  local last = last_session(keys, args)
  take(decoded(session.pins), PINS)
  take(decoded(session.loaded), LOADED)
  take(decoded(important), NAMED)
  take(decoded(last[5]), LAST)
  take(decoded(last[4]), LAST)
  local newest = newest_count > 0 and redis.pcall('ZREVRANGE', keys[3], 0, newest_count - 1) or {}
  if newest.err then newest = {} end
  take(newest, newest_count)
  return { redis.call('HGET', keys[1], 'generation') or '0', flat_of(session), last, topics_of(args, session),
    important, newest, said_in(keys[6], prefix, args[5]), memories }
end

-- up to two turns before and after one, nearest first
local function near(turns, id)
  local found = {}
  local function walk(from, is_before)
    for _ = 1, 2 do
      local before, after = beside(turns, from)
      from = is_before and before or after
      if not from or from == '' then return end
      found[#found + 1] = from
    end
  end
  walk(id, false)
  walk(id, true)
  return found
end

local function around(keys, args)
  local turns, similar, prefix = keys[1], keys[2], args[1]
  if not (similar and args[2]) then return misuse('rm_around_ro turns similar | prefix fields, ids …') end
  local memories, take = collector(prefix, split(args[2]))
  local reply = {}
  for i = 3, math.min(#args, 2 + MEMORIES) do
    local close, related = near(turns, args[i]), {}
    for _, edge in ipairs(items_in(similar, 'o' .. args[i])) do
      local other = string.match(edge, '^(.*)\30')
      if other then related[#related + 1] = other end
    end
    take(close, NAMED)
    take(related, NAMED)
    reply[#reply + 1], reply[#reply + 2] = close, related
  end
  reply[#reply + 1] = memories
  return reply
end

local function near_topics(keys, args)
  local meta, centroids, count = keys[1], keys[2], whole(args[3], 1, 100)
  if not (centroids and count and args[4]) then return misuse('rm_near_topics_ro meta centroids | …') end
  if redis.call('HGET', meta, 'centroids') ~= args[1] then return {} end
  local flat, reply = redis.pcall('VSIM', centroids, 'FP32', args[4], 'WITHSCORES', 'COUNT', count), {}
  for i = 1, flat.err and 0 or #flat, 2 do
    local reach = redis.pcall('HGET', args[2] .. flat[i], 'reach')
    -- VSIM's scores are 0 to 1
    reply[#reply + 1], reply[#reply + 2] = flat[i], string.format('%.6f', 2 * tonumber(flat[i + 1]) - 1)
    reply[#reply + 1] = type(reach) == 'string' and reach or '1'
  end
  return reply
end

local function reader(name, callback)
  redis.register_function { function_name = name, callback = callback, flags = { 'no-writes' } }
end

reader('rm_open_ro_v1', open)
reader('rm_around_ro_v1', around)
reader('rm_near_topics_ro_v1', near_topics)
