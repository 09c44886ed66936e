#!lua name=redismem_maintain
-- Version: 1
-- Rebuilds what is derived of one owner, in slices, while the owner is served.
--
-- Functions (KEYS -> ARGV -> reply)
--   rm_reindex_v1  ids | prefix first count        -> ids seen; indexes these memories again
--   rm_stage_v1    meta turns | prefix embedder dim field, (id content_hash prev_id prev_hash vector) …
--                  -> a word an id: OK STALE MISSING; stores vectors of the next embedder beside the old
--   rm_switch_v1   alias index meta | embedder dim field
--                  -> OK, the index that served before; searches use the new vectors from here on
--   rm_settle_v1   ids | prefix first count field old_field embedder
--                  -> ids seen; removes the old vectors
-- first and count are ranks in ids; a reply of fewer than count ends the walk.
--
-- Complexity: O(slice), 0.04 ms a memory (it is indexed again). Derived keys: prefix .. id.
-- Limits: slices of at most 1,000.

local function misuse(text)
  return redis.error_reply('RMEM_USAGE ' .. text)
end

local function slice(keys, args)
  local first, count = tonumber(args[2] or ''), tonumber(args[3] or '')
  if not (keys[1] and first and count) or count > 1000 then return nil end
  return redis.call('ZRANGE', keys[1], first, first + count - 1)
end

local function preceding(turns, id)
  local link = redis.call('HGET', turns, 'l' .. id)
  return link and string.match(link, '^[^\31]*') or ''
end

local function reindex(keys, args)
  local ids = slice(keys, args)
  if not ids then return misuse('rm_reindex ids | prefix first count') end
  for _, id in ipairs(ids) do
    local key = args[1] .. id
    if redis.call('HEXISTS', key, 'text') == 1 then redis.call('HSET', key, 'pk', id) end
  end
  return #ids
end

local function stage(keys, args)
  local meta, turns, prefix, embedder = keys[1], keys[2], args[1], args[2]
  local dim, field = tonumber(args[3] or ''), args[4]
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
    local raw = redis.call('HMGET', key, 'text', 'content_hash')
    local previous = raw[1] and preceding(turns, id)
    if not raw[1] then
      words[#words + 1] = 'MISSING'
    elseif (raw[2] or '') ~= args[i + 1] or previous ~= args[i + 2]
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
  local before = redis.call('HGET', meta, 'index') or ''
  local named = redis.pcall('FT.ALIASUPDATE', alias, index)
  if named.err then return named end
  redis.call('HSET', meta, 'index', index, 'embedder', args[1], 'dim', args[2], 'vector_field', args[3])
  redis.call('HINCRBY', meta, 'generation', 1)
  return { 'OK', before }
end

local function settle(keys, args)
  local ids = slice(keys, args)
  local field, old_field, embedder = args[4], args[5], args[6]
  if not (ids and embedder) or field == old_field then
    return misuse('rm_settle ids | prefix first count field old_field embedder')
  end
  for _, id in ipairs(ids) do
    local key = args[1] .. id
    local staged = redis.call('HGET', key, 'embedder_next')
    redis.call('HDEL', key, old_field, 'embedder_next')
    if staged == embedder then
      redis.call('HSET', key, 'embedder', embedder)
    elseif redis.call('HGET', key, 'embedder') ~= embedder then
      redis.call('HDEL', key, field, 'embedder')
    end
  end
  return #ids
end

redis.register_function('rm_reindex_v1', reindex)
redis.register_function('rm_stage_v1', stage)
redis.register_function('rm_switch_v1', switch)
redis.register_function('rm_settle_v1', settle)
