#!lua name=redismem_owner
-- Version: 6
-- Makes, parks and removes what one owner has as a whole: the exact index, its alias, every key.
--
-- Functions (KEYS -> ARGV -> reply)
--   rm_open_v1    alias index meta [ids] | now_ms embedder dim vector_field, FT.CREATE arguments …
--                 -> STALE: other vectors serve by now | OK | filling:<n>: the index exists and serves under its alias; filling: memories of before
--                 are not in it yet; index each again (rm_reindex), then call rm_filled with that word
--   rm_reopen_v1  the same -> GONE: the owner was forgotten | as rm_open
--   rm_filled_v1  meta | filling:<n>  -> OK | STALE: the index was made anew meanwhile
--   rm_chill_v1   meta graph0 graph1 | idle_before_s
--                 -> GONE | BUSY | OK: drops the indexes of an owner who was not read or written since; the
--                 memories stay, and the next read or write finds NOINDEX
--   rm_forget_v1  alias meta ids log turns … | prefix limit, every index the owner may have …
--                 -> OK memories keys done(0/1); removes sessions and what is derived (where the further KEYS are those
--                 of Owner.forgotten; a caller without the last three, sessions, the prefix of their keys and kept
--                 replies, leaves them to their TTLs), then memories, then all KEYS; call again until done
--
-- Complexity: O(1); rm_forget O(limit). Derived keys: prefix .. id, session_prefix .. id.
-- Storage: meta hash, here: index, algorithm (FLAT, or HNSW while there is a graph), vector_field, embedder, dim,
--   index_state (absent: complete; cold; filling:<n>), fills (how often it was filled).

-- part: check

local function open(keys, args)
  local alias, index, meta, ids = keys[1], keys[2], keys[3], keys[4]
  local now_ms, embedder, dim, field = whole(args[1], 1, 1e14), args[2], whole(args[3], 1, 65536), args[4]
  if not (meta and now_ms and dim and args[5]) then return misuse('rm_open alias index meta | …') end
  local wrong = wrong_type(meta, 'hash') or ids and wrong_type(ids, 'zset')
  if wrong then return wrong end
  -- a refreshed index has another name
  local serving, following, of = unpack(redis.call('HMGET', meta, 'index', 'index_next', 'vector_field'))
  if serving and of and of ~= field then return 'STALE' end
  -- one that is being made beside it does not hold everything yet
  local is_half = following and string.match(following, '^(.*) %d+$') == index
  local is_refreshed = serving == index .. ':again' and redis.pcall('FT.INFO', serving).err == nil
  if is_refreshed then index = serving end
  local made = is_refreshed and { err = 'already exists' } or redis.pcall('FT.CREATE', unpack(args, 5))
  if made.err and not string.find(made.err, 'already exists') then return made end
  local named = redis.pcall('FT.ALIASUPDATE', alias, index)
  if named.err then return named end
  -- seeded by the clock: see lua/write.lua
  redis.call('HSETNX', meta, 'generation', string.format('%.0f', now_ms * 1000))
  redis.call('HSET', meta, 'index', index, 'vector_field', field, 'embedder', embedder, 'dim', dim)
  redis.call('HSETNX', meta, 'algorithm', 'FLAT')
  local state = redis.call('HGET', meta, 'index_state')
  if is_half and not is_refreshed then redis.call('HDEL', meta, 'index_next') end
  if state == 'cold' or is_half and not is_refreshed or not made.err and (state or ids and redis.call('ZCARD', ids) > 0) then
    state = 'filling:' .. redis.call('HINCRBY', meta, 'fills', 1)
    redis.call('HSET', meta, 'index_state', state)
  end
  return state or 'OK'
end

local function reopen(keys, args)
  if not keys[3] then return misuse('rm_reopen alias index meta | …') end
  if redis.call('HEXISTS', keys[3], 'index') == 0 then return 'GONE' end
  return open(keys, args)
end

local function filled(keys, args)
  if not (keys[1] and args[1]) then return misuse('rm_filled meta | filling:<n>') end
  if redis.call('HGET', keys[1], 'index_state') ~= args[1] then return 'STALE' end
  redis.call('HDEL', keys[1], 'index_state', 'reindexed')
  return 'OK'
end

local function chill(keys, args)
  local meta, idle_before_s = keys[1], tonumber(args[1] or '')
  if not (keys[3] and idle_before_s) then return misuse('rm_chill meta graph0 graph1 | idle_before_s') end
  local raw = redis.call('HMGET', meta, 'index', 'index_state', 'next_embedder', 'last_activity', 'last_read',
    'index_next')
  if not raw[1] then return 'GONE' end
  local used_s = math.max(tonumber(raw[4] or '') or 0, tonumber(raw[5] or '') or 0)
  local following, begun_ms = string.match(raw[6] or '', '^(.*) (%d+)$')
  local is_followed = following and tonumber(begun_ms) >= idle_before_s * 1000
  if raw[2] or raw[3] or is_followed or used_s >= idle_before_s then return 'BUSY' end
  -- whoever made one beside it died
  if following then redis.pcall('FT.DROPINDEX', following) end
  redis.call('HDEL', meta, 'index_next')
  local dropped = redis.pcall('FT.DROPINDEX', raw[1])
  if dropped.err and redis.pcall('FT.INFO', raw[1]).err == nil then return dropped end
  redis.call('UNLINK', keys[2], keys[3])
  redis.call('HDEL', meta, 'graph', 'graph_next', 'graph_writes')
  redis.call('HSET', meta, 'index_state', 'cold', 'algorithm', 'FLAT')
  return 'OK'
end

-- summaries, topics and sessions have a key each; returns how many went
local function drop_each(names, prefix)
  local count = 0
  for _, name in ipairs(redis.pcall('ZRANGE', names, 0, -1)) do count = count + redis.call('UNLINK', prefix .. name) end
  return count + redis.call('UNLINK', names)
end

local function drop_derived(keys)
  local topics, summaries, summary, cluster = keys[18], keys[19], keys[20], keys[21]
  local sessions, session, count = keys[23], keys[24], 0
  if not cluster then return 0 end
  if session then count = drop_each(sessions, session) end
  count = count + drop_each(summaries, summary) + drop_each(topics, cluster)
  return count + redis.call('UNLINK', unpack(keys, 12, 17))
end

local function forget(keys, args)
  local alias, ids, prefix, limit = keys[1], keys[3], args[1], whole(args[2], 1, 1000)
  if not (keys[5] and limit and args[3]) then return misuse('rm_forget alias meta ids log turns | …') end
  local wrong = wrong_type(ids, 'zset')
  if wrong then return wrong end
  local derived = drop_derived(keys)

  local victims = redis.call('ZRANGE', ids, 0, limit - 1)
  if #victims == 0 then
    -- memories that other services wrote are in the index only
    local found = redis.pcall('FT.SEARCH', alias, '*', 'NOCONTENT', 'LIMIT', 0, limit)
    for i = 2, found.err and 0 or #found do victims[i - 1] = string.sub(found[i], #prefix + 1) end
  end
  local memories = 0
  for _, id in ipairs(victims) do memories = memories + redis.call('DEL', prefix .. id) end
  if #victims > 0 then
    redis.call('ZREM', ids, unpack(victims))
    return { 'OK', memories, derived, 0 }
  end

  -- refreshed ones have names of their own
  local raw = redis.call('HMGET', keys[2], 'index', 'index_next')
  for _, index in ipairs({ raw[1] or '', string.match(raw[2] or '', '^(.*) %d+$') or '', unpack(args, 3) }) do
    redis.pcall('FT.DROPINDEX', index)
  end
  return { 'OK', 0, derived + redis.call('UNLINK', unpack(keys, 2)), 1 }
end

redis.register_function('rm_open_v1', open)
redis.register_function('rm_reopen_v1', reopen)
redis.register_function('rm_filled_v1', filled)
redis.register_function('rm_chill_v1', chill)
redis.register_function('rm_forget_v1', forget)
