#!lua name=redismem_write
-- Version: 5
-- Changes one owner's memories, and everything made from them, in one step.
--
-- Functions (KEYS -> ARGV -> reply); put, update, delete, correct: with the further KEYS searches hot hits,
--   cached searches with an updated, deleted, superseded or superseding id go in the same step, and deleted
--   and superseded ids leave hot and hits; a caller without them leaves the caches to their TTLs. With the
--   further KEYS graph0 graph1, an owner's HNSW graphs (lua/graph.lua) follow each change of a vector; a caller
--   without them makes that owner's searches exact until the graph is built again. With the further KEY
--   archived, a delete or a put of an archived id takes it out of the archive.
--   rm_put_v1      meta ids log turns | prefix now_ms embedder dim log_length count, records …
--                  -> NOINDEX | OK generation stale [outcome id version embedded a record];
--                  outcomes CREATED UPDATED UNCHANGED, TAKEN (a derived id meets other content: give it
--                  another id) and, for all records after such a one, or after a few that joined a graph,
--                  WAITING: send them again
--   rm_update_v1   meta ids log turns | prefix now_ms embedder dim log_length version, one record
--                  -> NOINDEX | MISSING | STALE version | OK version embedded stale
--   rm_delete_v1   meta ids log turns | prefix now_ms log_length, ids …
--                  -> OK generation stale [DELETED or MISSING an id]
--   rm_correct_v1  meta ids log turns | prefix now_ms embedder dim log_length count old ids …, one record
--                  -> NOINDEX | MISSING id | TAKEN id | CREATED or UNCHANGED generation version embedded stale
--   rm_embed_v1    meta ids turns [graph0 graph1 derived …] | prefix now_ms embedder dim,
--                  (id content_hash prev_id prev_hash vector) …
--                  -> a word an id: OK STALE MISSING REFUSED, WAITING as above
--   A record is: id kind prev_id prev_hash created_at speaker fields, (field value) …; kind is
--   given | derived (an id made from the content) | keep (rm_update: the vector still fits) | minor (and so do
--   the cached searches, which hold only ids and scores).
--   prev is the turn before it in its session, which its vector was made from as well: a vector is
--   stored only if that turn still is the one before and has that content.
--   stale: ids of the turns after changed ones. Their vectors came from the old content and were dropped
--   here. Whatever is left without a vector the caller embeds again: rm_turns_ro, then rm_embed.
--
--
-- Complexity: O(fields) a record plus its re-indexing (about 0.04 ms) plus one pass over the cached searches
--   (0.15 ms for 128 of 10 hits); of a large owner about 2 ms more a vector, at most GRAPH_ADDS a call.
-- Storage: prefix..id hash; ids zset id -> created_at; meta hash; log stream; searches: lua/read.lua; hot, hits:
--   lua/cache.lua; turns hash:
--     l<id>       place of a turn: id before, id after, position, speaker, session; joined by \31
--     t<session>  the session's last turn: id, position; joined by \31
--     n           number of sessions so far
--     pad         65 spaces: a value this long keeps the hash a hash table; as a listpack (up to 512
--                 fields) the 100 look-ups of a search would take 0.5 ms
--   A session's turns stand in the order of writing; superseded ones leave. Positions of one session are
--   consecutive when written; two sessions are SESSION_STEP apart. See README, schema.
-- Derived keys: prefix .. id.
-- Limits: at most 500 records or ids a call. A memory key of a foreign type fails the whole call.

local UNPACK = 1000
local SESSION_STEP = 1048576
local FEW_IDS = 4
-- vectors that one call adds to a graph: each holds Redis for about 2 ms
local GRAPH_ADDS = 4

-- part: check
-- part: derived

-- check ---------------------------------------------------------------------------------------

local function wrong_types(ctx, ids)
  local wrong = wrong_type(ctx.meta, 'hash') or wrong_type(ctx.ids, 'zset') or wrong_type(ctx.turns, 'hash')
    or (ctx.log and wrong_type(ctx.log, 'stream')) or (ctx.searches and wrong_type(ctx.searches, 'hash'))
    or (ctx.hot and wrong_type(ctx.hot, 'zset')) or (ctx.hits and wrong_type(ctx.hits, 'hash'))
    or (ctx.archived and wrong_type(ctx.archived, 'zset')) or wrong_derived(ctx.derived, ctx.prefix)
  for _, id in ipairs(ids) do wrong = wrong or wrong_type(ctx.prefix .. id, 'hash') end
  return wrong
end

local function parsed(args, at)
  local record = {
    id = args[at], kind = args[at + 1], prev_id = args[at + 2], prev_hash = args[at + 3],
    created_at = args[at + 4], speaker = args[at + 5], fields = {}, values = {},
  }
  local count = whole(args[at + 6], 0, 1000)
  if not count or #args < at + 6 + 2 * count then return nil end
  for i = at + 7, at + 6 + 2 * count, 2 do
    record.fields[#record.fields + 1] = args[i]
    record.values[args[i]] = args[i + 1]
  end
  return record, at + 7 + 2 * count
end

-- what the writing functions have in common; nil when an argument is not what it must be
local function context_of(keys, args, log_length)
  local ctx = {
    meta = keys[1], ids = keys[2], log = keys[3], turns = keys[4], searches = keys[5], hot = keys[6],
    hits = keys[7], graph_keys = { keys[8], keys[9] }, archived = keys[10], derived = derived_keys(keys, 11), adds = 0,
    prefix = args[1], now_ms = whole(args[2], 1, 1e14), embedder = args[3], dim = whole(args[4], 1, 65536),
    log_length = log_length or args[5],
  }
  return ctx.turns and ctx.now_ms and (log_length or ctx.dim) and whole(ctx.log_length, 1, 2 ^ 53) and ctx or nil
end

-- read the owner's index; NOINDEX without one, misuse for a vector that would not fit it
local function unready(ctx, records)
  local raw = redis.call('HMGET', ctx.meta, 'index', 'embedder', 'vector_field', 'dim', 'index_state')
  ctx.store_embedder, ctx.vector_field = raw[2], raw[3] or 'embedding'
  if not raw[1] or raw[5] == 'cold' then return { 'NOINDEX' } end
  local dim = raw[2] == ctx.embedder and tonumber(raw[4] or '') or ctx.dim
  for _, record in ipairs(records) do
    local vector = record.values.embedding
    if vector and #vector ~= 2 * dim then return misuse('a vector has the wrong length') end
  end
end

-- read ----------------------------------------------------------------------------------------

-- id before, id after, position, speaker and session of a turn; '', '' for a memory outside of sessions
local function place(ctx, id)
  local raw = redis.call('HGET', ctx.turns, 'l' .. id)
  if not raw then return '', '' end
  local before, after, position, speaker, session =
    string.match(raw, '^([^\31]*)\31([^\31]*)\31(%d+)\31([^\31]*)\31(.*)$')
  if not session then return '', '' end
  return before, after, position, speaker, session
end

-- whether a vector made from `id` and the turn `prev_id` with that content still is right
local function fits(ctx, id, prev_id, prev_hash)
  local before = place(ctx, id)
  return before == prev_id and (before == ''
    or (redis.call('HGET', ctx.prefix .. before, 'content_hash') or '') == prev_hash)
end

-- write: nothing below may raise ----------------------------------------------------------------

-- Generations start at the clock in microseconds, so that a forgotten and re-created owner never repeats
-- one: no owner is written to a million times a second.
local function seed(now_ms)
  return string.format('%.0f', now_ms * 1000)
end

local function bump(ctx)
  redis.call('HSETNX', ctx.meta, 'generation', seed(ctx.now_ms))
  redis.call('HSET', ctx.meta, 'last_activity', string.format('%.3f', ctx.now_ms / 1000))
  return redis.call('HINCRBY', ctx.meta, 'generation', 1)
end

local function log(ctx, event, id, version, other)
  redis.call('XADD', ctx.log, 'MAXLEN', '~', ctx.log_length, '*', 'id', id, 'event', event,
    'version', version, 'at_ms', string.format('%.0f', ctx.now_ms), 'other', other or '')
end

local function next_created_at(ctx)
  -- strictly increasing an owner, so that the order of memories, and a cursor into it, is total
  local last = tonumber(redis.call('HGET', ctx.meta, 'last_created') or '0')
  local now = ctx.now_ms / 1000
  if now <= last then now = last + 0.000001 end
  local text = string.format('%.6f', now)
  redis.call('HSET', ctx.meta, 'last_created', text)
  return text
end

-- part: floats
-- part: graphs

-- drop the vector of the turn after `id`, which was made from `id` as well
local function drop_successor(ctx, id, stale)
  local _, after = place(ctx, id)
  if after ~= '' then
    redis.call('HDEL', ctx.prefix .. after, 'embedding', 'embedding_next', 'embedder', 'embedder_next')
    drop_from_graphs(ctx, after)
    note_reindexed(ctx.meta, 1)
    if ctx.derived then unlink_similar(ctx, after) end
    stale[#stale + 1] = after
  end
end

-- a stored time as the index and the zset take it; nil when another hand wrote something else
local function moment(text)
  local number = tonumber(text or '')
  return number and number > -1e12 and number < 1e12 and string.format('%.6f', number) or nil
end

local function set_place(ctx, id, ...)
  redis.call('HSET', ctx.turns, 'l' .. id, table.concat({ ... }, '\31'))
end

-- take a turn out of its session
local function unlink(ctx, id, stale)
  local before, after, _, _, session = place(ctx, id)
  if not session then return end
  drop_successor(ctx, id, stale)
  redis.call('HDEL', ctx.turns, 'l' .. id)
  local first, _, position, speaker = place(ctx, before)
  if position then
    set_place(ctx, before, first, after, position, speaker, session)
    if after == '' then redis.call('HSET', ctx.turns, 't' .. session, before .. '\31' .. position) end
  elseif after == '' then
    redis.call('HDEL', ctx.turns, 't' .. session)
  end
  local _, last, at, who = place(ctx, after)
  if at then set_place(ctx, after, before, last, at, who, session) end
end

-- put a turn at the end of its session, or note its speaker where it stands
local function link(ctx, id, session, speaker)
  if not session then return end
  local before, after, position = place(ctx, id)
  if not position then
    local tail = redis.call('HGET', ctx.turns, 't' .. session)
    local tail_id, tail_position = string.match(tail or '', '^([^\31]*)\31(%d+)$')
    if tail_id then
      before, position = tail_id, string.format('%.0f', tail_position + 1)
      local first, _, at, who = place(ctx, before)
      set_place(ctx, before, first, id, at or tail_position, who or '', session)
    else
      redis.call('HSET', ctx.turns, 'pad', string.rep(' ', 65))
      position = string.format('%.0f', redis.call('HINCRBY', ctx.turns, 'n', 1) * SESSION_STEP)
    end
    redis.call('HSET', ctx.turns, 't' .. session, id .. '\31' .. position)
  end
  set_place(ctx, id, before, after, position, speaker, session)
end

-- give a turn the place that goes with its session
local function relink(ctx, record, superseded, stale)
  local _, _, _, _, session = place(ctx, record.id)
  local wanted = not superseded and record.values.session_id or nil
  if session and session ~= wanted then unlink(ctx, record.id, stale) end
  link(ctx, record.id, wanted, record.speaker)
end

-- what a rewrite removes unless it sets it; other services' own fields stay
local CONTENT = { 'words', 'day', 'topics', 'entities', 'session_id', 'event_date', 'metadata', 'metadata_tags' }
local ORIGIN = { 'superseded_by', 'sources', 'base_importance' }
local VECTOR = { 'embedding', 'embedding_next', 'embedder', 'embedder_next', 'cluster' }

local function write_record(ctx, record, version, created_at, removed, is_new)
  local key, values, flat, gone = ctx.prefix .. record.id, record.values, {}, {}
  local function set(name, value)
    flat[#flat + 1], flat[#flat + 2] = name, value
  end
  for _, name in ipairs(record.fields) do
    if name ~= 'embedding' then set(name, values[name]) end
  end
  set('pk', record.id)
  set('version', version)
  set('created_at', created_at)
  set('updated_at', string.format('%.6f', ctx.now_ms / 1000))
  local vector = ctx.store_embedder == ctx.embedder and fits(ctx, record.id, record.prev_id, record.prev_hash)
    and values.embedding
  if vector then
    set(ctx.vector_field, vector)
    set('embedder', ctx.embedder)
  end
  for _, names in ipairs(removed) do
    for _, name in ipairs(names) do
      -- a refused vector is among the values, and the old one must not stay in its place
      if names == VECTOR or not values[name] then gone[#gone + 1] = name end
    end
  end
  if #gone > 0 then redis.call('HDEL', key, unpack(gone)) end
  redis.call('HSET', key, unpack(flat))
  note_reindexed(ctx.meta, is_new and 0 or 1)
  redis.call('ZADD', ctx.ids, created_at, record.id)
  if vector and not values.superseded_by then
    add_to_graphs(ctx, record.id, vector)
  elseif redis.call('HEXISTS', key, 'embedder') == 0 or values.superseded_by then
    drop_from_graphs(ctx, record.id)
  end
  return redis.call('HEXISTS', key, 'embedder')
end

local function put_one(ctx, record, stale)
  local old = redis.call('HMGET', ctx.prefix .. record.id, 'text', 'content_hash', 'superseded_by',
    'version', 'created_at', 'embedder')
  local there, values = old[1], record.values
  if there and old[2] == values.content_hash and (old[3] or '') == (values.superseded_by or '') then
    return 'UNCHANGED', old[4] or '0', old[6] and 1 or 0
  end
  if there and record.kind == 'derived' then return 'TAKEN', old[4] or '0', 0 end
  local version = bump(ctx)
  local created_at = moment(old[5]) or moment(record.created_at) or next_created_at(ctx)
  relink(ctx, record, values.superseded_by, stale)
  if ctx.archived then redis.call('ZREM', ctx.archived, record.id) end
  -- a new one too: another hand may have removed what had this id
  unmake(ctx, record.id)
  leave_topic(ctx, record.id)
  local embedded = write_record(ctx, record, version, created_at, there and { CONTENT, ORIGIN, VECTOR } or {},
    not there)
  note_written(ctx, record.id, values, embedded == 1)
  drop_successor(ctx, record.id, stale)
  if values.superseded_by then redis.call('HSET', ctx.meta, 'superseded', 1) end
  log(ctx, there and 'updated' or 'created', record.id, version)
  return there and 'UPDATED' or 'CREATED', version, embedded
end

-- drop the cached searches that hold one of the ids: generation, total, then id, score a hit; joined by \31
local function drop_searches(ctx, ids)
  if not ctx.searches or #ids == 0 or redis.call('EXISTS', ctx.searches) == 0 then return end
  local wanted, dropped, flat, find = {}, {}, redis.call('HGETALL', ctx.searches), string.find
  for _, id in ipairs(ids) do wanted[id] = '\31' .. id .. '\31' end
  for i = 1, #flat, 2 do
    -- most searches hold none of a few ids, and that find says soonest
    local search, maybe, held = flat[i + 1], #ids > FEW_IDS, false
    for at = 1, maybe and 0 or #ids do maybe = maybe or find(search, wanted[ids[at]], 1, true) end
    for id in string.gmatch(maybe and search or '', '\31[^\31]*\31([^\31]*)') do held = held or wanted[id] end
    if held then dropped[#dropped + 1] = flat[i] end
  end
  for first = 1, #dropped, UNPACK do
    redis.call('HDEL', ctx.searches, unpack(dropped, first, math.min(first + UNPACK - 1, #dropped)))
  end
end

local function drop_hot(ctx, ids)
  if ctx.hot and #ids > 0 then redis.call('ZREM', ctx.hot, unpack(ids)) end
  if ctx.hits and #ids > 0 then redis.call('HDEL', ctx.hits, unpack(ids)) end
  if ctx.derived and #ids > 0 then redis.call('ZREM', ctx.derived.used, unpack(ids)) end
end

-- functions -----------------------------------------------------------------------------------

local function put(keys, args)
  local ctx, records, ids, at = context_of(keys, args), {}, {}, 7
  local count = whole(args[6], 0, 500)
  if not (ctx and count) then return misuse('rm_put meta ids log turns | …') end
  for i = 1, count do
    records[i], at = parsed(args, at)
    if not records[i] then return misuse('rm_put: a record is cut off') end
    ids[i] = records[i].id
  end
  local refusal = wrong_types(ctx, ids) or unready(ctx, records)
  if refusal then return refusal end

  local stale, outcomes, updated, waiting = {}, {}, {}, false
  for _, record in ipairs(records) do
    local outcome, version, embedded = 'WAITING', '0', 0
    if not waiting then outcome, version, embedded = put_one(ctx, record, stale) end
    -- later turns of the same session must not overtake this one
    waiting = waiting or outcome == 'TAKEN' or ctx.adds >= GRAPH_ADDS
    if outcome == 'UPDATED' then updated[#updated + 1] = record.id end
    for _, item in ipairs({ outcome, record.id, version, embedded }) do outcomes[#outcomes + 1] = item end
  end
  drop_searches(ctx, updated)
  return { 'OK', redis.call('HGET', ctx.meta, 'generation'), stale, outcomes }
end

local function update(keys, args)
  local ctx, record, expected = context_of(keys, args), parsed(args, 7), whole(args[6], 0, 2 ^ 53)
  if not (ctx and record and expected) then return misuse('rm_update meta ids log turns | …') end
  local wrong = wrong_types(ctx, { record.id })
  if wrong then return wrong end
  local old = redis.call('HMGET', ctx.prefix .. record.id, 'text', 'version', 'created_at', 'superseded_by',
    'importance')
  if not old[1] then return { 'MISSING' } end
  local refusal = unready(ctx, { record })
  if refusal then return refusal end
  if (whole(old[2], 0, 2 ^ 53) or 0) ~= expected then return { 'STALE', old[2] or '0' } end

  local version, stale, minor = bump(ctx), {}, record.kind == 'minor'
  local keep = minor or record.kind == 'keep'
  relink(ctx, record, old[4], stale)
  local created_at = moment(old[3]) or next_created_at(ctx)
  if not minor then unmake(ctx, record.id) end
  if not keep then leave_topic(ctx, record.id) end
  -- what decays is what the caller gave last
  local is_same = tonumber(old[5] or '') == tonumber(record.values.importance or '')
  if not is_same then redis.call('HDEL', ctx.prefix .. record.id, 'base_importance') end
  local embedded = write_record(ctx, record, version, created_at, keep and { CONTENT } or { CONTENT, VECTOR })
  record.values.superseded_by = old[4] or nil
  if minor then note_weighed(ctx, record.values) else note_written(ctx, record.id, record.values, embedded == 1) end
  if not keep then drop_successor(ctx, record.id, stale) end
  if not minor then drop_searches(ctx, { record.id }) end
  log(ctx, 'updated', record.id, version)
  return { 'OK', version, embedded, stale }
end

local function delete(keys, args)
  local ctx, ids = context_of(keys, args, args[3] or ''), { unpack(args, 4) }
  if not ctx then return misuse('rm_delete meta ids log turns | …') end
  local wrong = wrong_types(ctx, ids)
  if wrong then return wrong end

  local stale, outcomes = {}, {}
  for i, id in ipairs(ids) do
    outcomes[i] = 'MISSING'
    unlink(ctx, id, stale)
    unmake(ctx, id)
    leave_topic(ctx, id)
    drop_from_graphs(ctx, id)
    local archived = ctx.archived and redis.call('ZREM', ctx.archived, id) or 0
    if redis.call('DEL', ctx.prefix .. id) + archived > 0 then
      outcomes[i] = 'DELETED'
      note_reindexed(ctx.meta, 1)
      log(ctx, 'deleted', id, bump(ctx))
    end
    redis.call('ZREM', ctx.ids, id)
  end
  drop_searches(ctx, ids)
  drop_hot(ctx, ids)
  return { 'OK', redis.call('HGET', ctx.meta, 'generation') or '0', stale, outcomes }
end

local function correct(keys, args)
  local ctx, count = context_of(keys, args), whole(args[6], 1, 500)
  local record = count and parsed(args, 7 + count)
  if not (ctx and record) then return misuse('rm_correct meta ids log turns | …') end
  local olds = { unpack(args, 7, 6 + count) }
  local refusal = wrong_types(ctx, { record.id, unpack(olds) })
  if refusal then return refusal end
  local done = 0
  for _, id in ipairs(olds) do
    local old = redis.call('HMGET', ctx.prefix .. id, 'text', 'superseded_by')
    if not old[1] then return { 'MISSING', id } end
    if old[2] == record.id then done = done + 1 end
  end
  refusal = unready(ctx, { record })
  if refusal then return refusal end
  local there = redis.call('HMGET', ctx.prefix .. record.id, 'content_hash', 'version', 'embedder', 'text',
    'superseded_by')
  local same = there[4] and there[1] == record.values.content_hash and not there[5]
  if same and done == count then
    return { 'UNCHANGED', redis.call('HGET', ctx.meta, 'generation'), there[2], there[3] and 1 or 0, {} }
  end
  -- an unrelated memory with this id must not be overwritten by a correction of others
  if there[4] and not same then return { 'TAKEN', record.id } end

  local stale = {}
  local outcome, version = put_one(ctx, record, stale)
  for _, id in ipairs(olds) do
    leave_topic(ctx, id)
    if place(ctx, id) ~= '' then
      -- its vector was made from the turn before as well, whose delete will not find it any more
      redis.call('HDEL', ctx.prefix .. id, unpack(VECTOR))
      stale[#stale + 1] = id
    end
    unlink(ctx, id, stale)
    unmake(ctx, id)
    drop_from_graphs(ctx, id)
    version = bump(ctx)
    redis.call('HSET', ctx.prefix .. id, 'superseded_by', record.id, 'version', version,
      'updated_at', string.format('%.6f', ctx.now_ms / 1000))
    note_reindexed(ctx.meta, 1)
    log(ctx, 'superseded', id, version, record.id)
  end
  redis.call('HSET', ctx.meta, 'superseded', 1)
  log(ctx, 'corrects', record.id, version, cjson.encode(olds))
  drop_searches(ctx, { record.id, unpack(olds) })
  drop_hot(ctx, olds)
  local raw = redis.call('HMGET', ctx.prefix .. record.id, 'version', 'embedder')
  return { outcome, version, raw[1], raw[2] and 1 or 0, stale }
end

local function embed(keys, args)
  local ctx = {
    meta = keys[1], ids = keys[2], turns = keys[3], graph_keys = { keys[4], keys[5] }, adds = 0,
    prefix = args[1], now_ms = whole(args[2], 1, 1e14), embedder = args[3], dim = whole(args[4], 1, 65536),
    derived = derived_keys(keys, 6),
  }
  if not (ctx.turns and ctx.now_ms and ctx.dim) or (#args - 4) % 5 ~= 0 then
    return misuse('rm_embed meta ids turns | prefix now_ms embedder dim, …')
  end
  local ids, records = {}, {}
  for i = 5, #args, 5 do
    ids[#ids + 1] = args[i]
    records[#records + 1] = { values = { embedding = args[i + 4] } }
  end
  local refusal = wrong_types(ctx, ids) or unready(ctx, records)
  if refusal and refusal.err then return refusal end

  local words, written = {}, false
  for i = 5, #args, 5 do
    local id, key = args[i], ctx.prefix .. args[i]
    local raw = redis.call('HMGET', key, 'text', 'content_hash', 'created_at', 'superseded_by')
    if ctx.adds >= GRAPH_ADDS then
      words[#words + 1] = 'WAITING'
    elseif not raw[1] then
      words[#words + 1] = 'MISSING'
    elseif ctx.store_embedder ~= ctx.embedder then
      words[#words + 1] = 'REFUSED'
    elseif (raw[2] or '') ~= args[i + 1] or not fits(ctx, id, args[i + 2], args[i + 3]) then
      words[#words + 1] = 'STALE'
    else
      -- a memory that another service wrote joins the list of ids here
      local created_at = moment(raw[3]) or next_created_at(ctx)
      redis.call('HSET', key, ctx.vector_field, args[i + 4], 'embedder', ctx.embedder, 'pk', id,
        'created_at', created_at)
      local is_new = redis.call('ZADD', ctx.ids, 'NX', created_at, id) == 1
      if not raw[4] then
        add_to_graphs(ctx, id, args[i + 4])
        note_embedded(ctx, id, is_new)
      end
      note_reindexed(ctx.meta, 1)
      words[#words + 1], written = 'OK', true
    end
  end
  if written then redis.call('HINCRBY', ctx.meta, 'generation', 1) end
  return words
end

redis.register_function('rm_put_v1', put)
redis.register_function('rm_update_v1', update)
redis.register_function('rm_delete_v1', delete)
redis.register_function('rm_correct_v1', correct)
redis.register_function('rm_embed_v1', embed)
