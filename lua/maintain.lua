#!lua name=redismem_maintain
-- Version: 3
-- Rebuilds what is derived of one owner, in slices, while the owner is served.
--
-- Functions (KEYS -> ARGV -> reply)
--   rm_adopt_v1    alias ids meta | prefix offset limit -> OK found added; lists memories that another
--                  service wrote, so that the others see them; fewer found than limit ends the walk
--   rm_reindex_v1  ids | prefix, ids …             -> how many exist; indexes these memories again
--   rm_refresh_begin_v1  index meta | now_ms patience_ms, FT.CREATE arguments …
--                  -> GONE | BUSY | a word: makes an index beside the one that serves, to index every memory in
--                  (rm_reindex). RediSearch 2.10 counts a version of a memory that was indexed anew on: in the
--                  average length for good, in the number of memories with a word until its garbage collector comes, which
--                  waits for 100 of them and 30 s. Frequent words then weigh less than nothing
--   rm_refresh_end_v1    alias index meta searches | word counted -> STALE | SHORT | OK: searches use it, the old one
--                  and what is cached of it go. STALE: it was begun again, or is not what serves; SHORT: it has fewer memories
--                  than the old one. counted: `reindexed` of meta before it was begun
--   rm_begin_v1    index meta | embedder restart(0/1), FT.CREATE arguments …
--                  -> GONE | STARTED | RESUMED: an index for the vectors of the next embedder
--   rm_stage_v1    meta turns | prefix embedder dim field, (id content_hash prev_id prev_hash vector) …
--                  -> a word an id: OK STALE MISSING; stores vectors of the next embedder beside the old
--   rm_switch_v1   alias index meta | embedder dim field
--                  -> GONE | OK: searches use the new vectors from here on
--   rm_settle_v1   meta | prefix field old_field embedder, ids …
--                  -> how many exist; removes the old vectors
--
-- Complexity: O(slice), 0.04 ms a memory (it is indexed again). Derived keys: prefix .. id.
-- Limits: slices of at most 1,000.

-- part: check

local function is_record(key)
  return redis.call('TYPE', key).ok == 'hash' and redis.call('HEXISTS', key, 'text') == 1
end

local function preceding(turns, id)
  local link = redis.call('HGET', turns, 'l' .. id)
  return link and string.match(link, '^[^\31]*') or ''
end

local function adopt(keys, args)
  local alias, ids, meta, prefix = keys[1], keys[2], keys[3], args[1]
  local offset, limit = whole(args[2], 0, 1e7), whole(args[3], 1, 1000)
  if not (meta and offset and limit) then return misuse('rm_adopt alias ids meta | prefix offset limit') end
  local found = redis.pcall('FT.SEARCH', alias, '*', 'NOCONTENT', 'SORTBY', 'created_at', 'LIMIT', offset, limit)
  if found.err then return { 'OK', 0, 0 } end
  local added = 0
  for i = 2, #found do
    local raw = redis.call('HMGET', found[i], 'created_at', 'superseded_by')
    if raw[2] then redis.call('HSET', meta, 'superseded', 1) end
    local created_at = tonumber(raw[1] or '') or 0
    if not (created_at > -1e12 and created_at < 1e12) then created_at = 0 end
    added = added + redis.call('ZADD', ids, 'NX', string.format('%.6f', created_at),
      string.sub(found[i], #prefix + 1))
  end
  return { 'OK', #found - 1, added }
end

local function reindex(keys, args)
  if not (keys[1] and args[1]) then return misuse('rm_reindex ids | prefix, ids') end
  local count = 0
  for i = 2, #args do
    local key = args[1] .. args[i]
    if redis.call('TYPE', key).ok == 'hash' then
      redis.call('HSET', key, 'pk', args[i])
      count = count + 1
    end
  end
  return count
end

-- another index must not be made while one is, for a new embedder or after it was parked; and it must be of the vectors
-- that serve
local function is_settled(index, raw)
  local name = ':flat:' .. (raw[5] or '')
  local is_of_field = string.sub(index, -#name) == name or string.sub(index, -#name - 6) == name .. ':again'
  return raw[1] and raw[1] ~= index and is_of_field and not raw[2] and not raw[3]
end

local function refresh_begin(keys, args)
  local index, meta, now_ms, patience_ms = keys[1], keys[2], whole(args[1], 1, 1e14), whole(args[2], 0, 1e9)
  if not (meta and patience_ms and args[3]) then return misuse('rm_refresh_begin index meta | now_ms patience_ms, …') end
  local raw = redis.call('HMGET', meta, 'index', 'next_embedder', 'index_state', 'index_next', 'vector_field')
  if not raw[1] then return 'GONE' end
  local begun_ms = tonumber(string.match(raw[4] or '', ' (%d+)$') or '') or 0
  if not is_settled(index, raw) or begun_ms > now_ms - patience_ms then return 'BUSY' end
  redis.pcall('FT.DROPINDEX', index)
  local made = redis.pcall('FT.CREATE', unpack(args, 3))
  if made.err then return made end
  local word = index .. ' ' .. args[1]
  redis.call('HSET', meta, 'index_next', word)
  return word
end

local function held(index)
  local found = redis.pcall('FT.SEARCH', index, '*', 'LIMIT', 0, 0, 'DIALECT', 2)
  return found.err and 0 or found[1]
end

local function refresh_end(keys, args)
  local alias, index, meta, counted = keys[1], keys[2], keys[3], whole(args[2], 0, 2 ^ 53)
  if not (keys[4] and counted) then return misuse('rm_refresh_end alias index meta searches | word counted') end
  local raw = redis.call('HMGET', meta, 'index', 'next_embedder', 'index_state', 'index_next', 'vector_field', 'reindexed')
  if raw[4] ~= args[1] or raw[1] == index then return 'STALE' end
  local settled = is_settled(index, raw)
  if not settled or held(index) < held(raw[1]) then
    redis.pcall('FT.DROPINDEX', index)
    redis.call('HDEL', meta, 'index_next')
    return settled and 'SHORT' or 'STALE'
  end
  local named = redis.pcall('FT.ALIASUPDATE', alias, index)
  if named.err then return named end
  local since = math.max(0, (tonumber(raw[6] or '') or 0) - counted)
  redis.call('HSET', meta, 'index', index, 'reindexed', string.format('%.0f', since))
  redis.call('HDEL', meta, 'index_next')
  redis.pcall('FT.DROPINDEX', raw[1])
  redis.call('UNLINK', keys[4])
  return 'OK'
end

local function begin(keys, args)
  local index, meta, embedder = keys[1], keys[2], args[1]
  if not (meta and args[3]) then return misuse('rm_begin index meta | embedder restart, FT.CREATE …') end
  local raw = redis.call('HMGET', meta, 'index', 'next_embedder')
  if not raw[1] then return 'GONE' end
  if raw[1] == index then return misuse('rm_begin: this index serves') end
  if raw[2] == embedder and args[2] == '0' then return 'RESUMED' end
  redis.pcall('FT.DROPINDEX', index)
  local made = redis.pcall('FT.CREATE', unpack(args, 3))
  if made.err then return made end
  redis.call('HSET', meta, 'next_embedder', embedder)
  return 'STARTED'
end

local function stage(keys, args)
  local meta, turns, prefix, embedder = keys[1], keys[2], args[1], args[2]
  local dim, field = whole(args[3], 1, 65536), args[4]
  if not (turns and dim and field) or (#args - 4) % 5 ~= 0 then
    return misuse('rm_stage meta turns | prefix embedder dim field, …')
  end
  for i = 9, #args, 5 do
    if #args[i] ~= 2 * dim then return misuse('rm_stage: a vector has the wrong length') end
  end
  if redis.call('HGET', meta, 'vector_field') == field then return misuse('rm_stage: the field is in use') end
  local words = {}
  for i = 5, #args, 5 do
    local id, key = args[i], prefix .. args[i]
    local there = is_record(key)
    local previous = there and preceding(turns, id)
    if not there then
      words[#words + 1] = 'MISSING'
    elseif (redis.call('HGET', key, 'content_hash') or '') ~= args[i + 1] or previous ~= args[i + 2]
        or (previous ~= '' and (redis.call('HGET', prefix .. previous, 'content_hash') or '') ~= args[i + 3]) then
      words[#words + 1] = 'STALE'
    else
      redis.call('HSET', key, field, args[i + 4], 'embedder_next', embedder, 'pk', id)
      words[#words + 1] = 'OK'
    end
  end
  return words
end

local function switch(keys, args)
  local alias, index, meta = keys[1], keys[2], keys[3]
  if not (meta and args[3]) then return misuse('rm_switch alias index meta | embedder dim field') end
  if redis.call('HEXISTS', meta, 'index') == 0 then
    redis.pcall('FT.DROPINDEX', index)
    return 'GONE'
  end
  local named = redis.pcall('FT.ALIASUPDATE', alias, index)
  if named.err then return named end
  redis.call('HSET', meta, 'index', index, 'embedder', args[1], 'dim', args[2], 'vector_field', args[3],
    'algorithm', 'FLAT')
  -- the graph is of the old vectors, and the new index is complete; keys of graphs go with the next round of
  -- maintenance
  redis.call('HDEL', meta, 'graph', 'graph_next', 'graph_writes', 'index_state', 'reindexed')
  redis.call('HINCRBY', meta, 'generation', 1)
  return 'OK'
end

local function settle(keys, args)
  local meta, prefix, field, old_field, embedder = keys[1], args[1], args[2], args[3], args[4]
  if not (meta and embedder) or redis.call('HGET', meta, 'vector_field') ~= field or field == old_field then
    return misuse('rm_settle meta | prefix field old_field embedder, ids')
  end
  local count = 0
  for i = 5, #args do
    local key = prefix .. args[i]
    if is_record(key) then
      local staged = redis.call('HGET', key, 'embedder_next')
      redis.call('HDEL', key, old_field, 'embedder_next')
      if staged == embedder then
        redis.call('HSET', key, 'embedder', embedder)
      elseif redis.call('HGET', key, 'embedder') ~= embedder then
        redis.call('HDEL', key, field, 'embedder')
      end
      count = count + 1
    end
  end
  -- they were indexed anew
  if count > 0 then redis.call('HINCRBY', meta, 'reindexed', count) end
  return count
end

redis.register_function('rm_adopt_v1', adopt)
redis.register_function('rm_reindex_v1', reindex)
redis.register_function('rm_refresh_begin_v1', refresh_begin)
redis.register_function('rm_refresh_end_v1', refresh_end)
redis.register_function('rm_begin_v1', begin)
redis.register_function('rm_stage_v1', stage)
redis.register_function('rm_switch_v1', switch)
redis.register_function('rm_settle_v1', settle)
