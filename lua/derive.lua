#!lua name=redismem_derive
-- Version: 2
-- Writes what is derived of one owner's memories, if what it was made from still is as it was read.
--
-- Functions (KEYS -> ARGV -> reply); D: the eleven keys of lua/parts/derived.lua; a digest is what digest_of there
--   made of a memory when it was read. STALE: read again and begin anew
--   rm_profile_v1      meta D | prefix now_ms patched count, (id digest) …, (field value) …
--                      -> GONE | STALE | OK: patched: that field as it was read, or empty
--   rm_profile_set_v1  meta D | prefix now_ms, (field value) …
--                      -> OK: values are JSON; an empty one gives the field back to the compiler
--   rm_summary_v1      meta D | prefix now_ms ttl_ms name count, (id digest) …, (field value) …
--                      -> STALE | OK; without sources the summary goes
--   rm_topics_v1       meta D centroids | prefix now_ms embedder links, (number reach centroid size
--                      words digests) … -> STALE (other vectors serve) | OK; words: JSON [[word, [id …]] …], digests:
--                      JSON {id: digest}; a witness that is not as it was read is left out
--   rm_topics_end_v1   meta D centroids | prefix now_ms clustered, numbers … -> OK removed: the topics that are left;
--                      clustered: how many of the new memories were in it
--   rm_assign_v1       meta D | prefix now_ms, (id digest cluster) … -> how many changed; an empty cluster takes it away
--   rm_link_v1         meta D | prefix now_ms, (id digest vector_digest cluster count, (other digest vector_digest
--                      cosine kind why is_newer) …) … -> a word an id: OK STALE GONE; vector_digest: 16 of its
--                      SHA-1, or empty where it has none; kind: duplicate, contradiction or empty; is_newer: id came later
--   rm_decay_v1        meta D weights | prefix now_ms step, ids … -> how many changed by at least step
--
-- Complexity: O(items); re-indexing takes 0.1 ms for each memory whose topic or importance changes.
-- Storage:
--   made hash       id -> names of what was made from it: profile, summary:<kind>:<name>, cluster:<number>
--   profile hash    fields of views.Profile, lists as JSON; patched (JSON of what a caller set), sources (JSON of ids),
--                   digests (blank between), compiled_at, valid_until (epoch s)
--   summary..<kind>:<name> hash  text, tokens, method, generated_at, sources, digests; with a TTL
--   cluster..<number> hash  label, words, digests (JSON {id: digest}), centroid (FLOAT32), reach, size,
--                   made_at, embedder
--   topics zset number -> size; summaries zset <kind>:<name> -> made at; centroids vector set of numbers
--   similar hash    o<id>: id \30 cosine of its nearest; i<id>: ids that have it among theirs; each between \31
--   conflicts hash  older \31 newer -> kind, cosine, why and the digests of both; joined by \31
--   fresh set of ids to link; used zset id -> last access; weights hash type -> JSON of weights by age in days
--   meta hash, here: unclustered (new memories since the last clustering), clustered_s, topic_number (of the
--                   next new topic), centroids (their embedder)
--   memory hash, here: cluster (number of its topic, or uncategorized|near-<number>), base_importance (before
--   decay)
-- Derived keys: prefix .. id, summary .. name, cluster .. number.
-- Limits: at most 500 items a call.

local ITEMS = 500

-- part: check
-- part: derived

-- check ---------------------------------------------------------------------------------------

local function context_of(keys, args)
  local ctx = {
    meta = keys[1], derived = derived_keys(keys, 2), prefix = args[1], now_ms = whole(args[2], 1, 1e14), last = keys[13],
  }
  if not (ctx.derived and ctx.now_ms) then return nil, misuse('meta, eleven derived keys | prefix now_ms …') end
  local wrong = wrong_type(ctx.meta, 'hash') or wrong_derived(ctx.derived, ctx.prefix)
  if wrong then return nil, wrong end
  return ctx
end

-- sources from args[at] on, a count before them: ids, whether all are as they were read, and what comes after
local function sources_of(ctx, args, at)
  local count = whole(args[at], 0, ITEMS)
  if not count or #args < at + 2 * count then return nil end
  local ids, is_true = {}, true
  for i = at + 1, at + 2 * count, 2 do
    ids[#ids + 1] = args[i]
    is_true = is_true and digest_of(ctx.prefix, args[i]) == args[i + 1]
  end
  return ids, is_true, at + 1 + 2 * count
end

-- write: nothing below may raise ----------------------------------------------------------------

local function name_all(ctx, name, ids)
  for _, id in ipairs(ids) do put_in(ctx.derived.made, id, name) end
end

local function set_fields(key, args, at)
  for i = at, #args - 1, 2 do redis.call('HSET', key, args[i], args[i + 1]) end
end

local function profile(keys, args)
  local ctx, refusal = context_of(keys, args)
  if not ctx then return refusal end
  local ids, is_true, at = sources_of(ctx, args, 4)
  if not ids then return misuse('rm_profile … | prefix now_ms patched count, (id digest) …, (field value) …') end
  if redis.call('EXISTS', ctx.meta) == 0 then return 'GONE' end
  local key = ctx.derived.profile
  if not is_true or (redis.call('HGET', key, 'patched') or '') ~= args[3] then return 'STALE' end
  drop_profile(ctx)
  set_fields(key, args, at)
  name_all(ctx, 'profile', ids)
  return 'OK'
end

local function profile_set(keys, args)
  local ctx, refusal = context_of(keys, args)
  if not ctx then return refusal end
  local patched = decoded(redis.call('HGET', ctx.derived.profile, 'patched'))
  for i = 3, #args - 1, 2 do
    if args[i + 1] == '' then
      patched[args[i]] = nil
      redis.call('HDEL', ctx.derived.profile, args[i])
    else
      -- kept as text: cjson would turn an empty list into an object
      patched[args[i]] = args[i + 1]
      redis.call('HSET', ctx.derived.profile, args[i], args[i + 1])
    end
  end
  if next(patched) then
    redis.call('HSET', ctx.derived.profile, 'patched', cjson.encode(patched))
  else
    redis.call('HDEL', ctx.derived.profile, 'patched')
  end
  queue(ctx, 'profile', SOON)
  return 'OK'
end

local function summary(keys, args)
  local ctx, refusal = context_of(keys, args)
  if not ctx then return refusal end
  local ttl_ms, name = whole(args[3], 1, 1e12), args[4]
  local ids, is_true, at = sources_of(ctx, args, 5)
  if not (ttl_ms and ids) then return misuse('rm_summary … | prefix now_ms ttl_ms name count, …') end
  if not is_true then return 'STALE' end
  local key = ctx.derived.summary .. name
  local wrong = wrong_type(key, 'hash')
  if wrong then return wrong end
  drop_summary(ctx, name)
  if #ids == 0 then return 'OK' end
  set_fields(key, args, at)
  redis.call('PEXPIRE', key, args[3])
  redis.call('ZADD', ctx.derived.summaries, string.format('%.3f', ctx.now_ms / 1000), name)
  name_all(ctx, 'summary:' .. name, ids)
  return 'OK'
end

local function unname_topic(ctx, number)
  local ids = {}
  for _, entry in ipairs(decoded(redis.pcall('HGET', ctx.derived.cluster .. number, 'words'))) do
    for _, id in ipairs(entry[2] or {}) do ids[#ids + 1] = id end
  end
  for _, id in ipairs(ids) do take_from(ctx.derived.made, id, 'cluster:' .. number) end
end

-- for searches of the nearest topics; a server without vector sets has none
local function add_centroid(ctx, number, centroid, links)
  local added = redis.pcall('VADD', ctx.last, 'FP32', centroid, number, 'NOQUANT', 'M', links)
  if type(added) == 'table' then
    -- those of an embedder of another dimension
    redis.call('UNLINK', ctx.last)
    added = redis.pcall('VADD', ctx.last, 'FP32', centroid, number, 'NOQUANT', 'M', links)
  end
  if type(added) ~= 'table' then redis.call('HINCRBY', ctx.meta, 'graph_writes', 1) end
end

local function topics(keys, args)
  local ctx, refusal = context_of(keys, args)
  if not ctx then return refusal end
  if not ctx.last or (#args - 4) % 6 ~= 0 then return misuse('rm_topics meta D centroids | …') end
  if redis.call('HGET', ctx.meta, 'embedder') ~= args[3] then return 'STALE' end
  local cluster = ctx.derived.cluster
  for i = 5, #args, 6 do
    local wrong = wrong_type(cluster .. args[i], 'hash')
    if wrong then return wrong end
    local is_whole = whole(args[i], 1, 2 ^ 53) and whole(args[i + 3], 0, 2 ^ 53)
    if not is_whole then return misuse('rm_topics: number and size') end
  end
  for i = 5, #args, 6 do
    local number, key, digests, gone = args[i], cluster .. args[i], decoded(args[i + 5]), {}
    for id, digest in pairs(digests) do gone[id] = digest_of(ctx.prefix, id) ~= digest or nil end
    unname_topic(ctx, number)
    redis.call('HSET', key, 'reach', args[i + 1], 'centroid', args[i + 2], 'size', args[i + 3], 'words', args[i + 4],
      'digests', args[i + 5],
      'made_at', string.format('%.3f', ctx.now_ms / 1000), 'embedder', args[3])
    for _, entry in ipairs(drop_witness(ctx, number, gone)) do name_all(ctx, 'cluster:' .. number, entry[2]) end
    redis.call('ZADD', ctx.derived.topics, args[i + 3], number)
    local next_number = tonumber(redis.call('HGET', ctx.meta, 'topic_number') or '') or 1
    redis.call('HSET', ctx.meta, 'topic_number', math.max(next_number, (tonumber(number) or 0) + 1))
    add_centroid(ctx, number, args[i + 2], args[4])
  end
  redis.call('HSET', ctx.meta, 'centroids', args[3])
  return 'OK'
end

local function topics_end(keys, args)
  local ctx, refusal = context_of(keys, args)
  if not ctx then return refusal end
  local clustered = whole(args[3], 0, 2 ^ 53)
  if not (ctx.last and clustered) then return misuse('rm_topics_end meta D centroids | prefix now_ms clustered, …') end
  local kept, removed = {}, 0
  for i = 4, #args do kept[args[i]] = true end
  for _, number in ipairs(redis.call('ZRANGE', ctx.derived.topics, 0, -1)) do
    if not kept[number] then
      unname_topic(ctx, number)
      redis.call('UNLINK', ctx.derived.cluster .. number)
      drop_summary(ctx, 'topic:' .. number)
      redis.call('ZREM', ctx.derived.topics, number)
      redis.pcall('VREM', ctx.last, number)
      removed = removed + 1
    end
  end
  if redis.call('EXISTS', ctx.meta) == 1 then
    redis.call('HINCRBY', ctx.meta, 'unclustered', -clustered)
    redis.call('HSET', ctx.meta, 'clustered_s', string.format('%.3f', ctx.now_ms / 1000))
  end
  return { 'OK', removed }
end

local function assign(keys, args)
  local ctx, refusal = context_of(keys, args)
  if not ctx then return refusal end
  local changed = 0
  for i = 3, #args - 2, 3 do
    local key = ctx.prefix .. args[i]
    if digest_of(ctx.prefix, args[i]) == args[i + 1]
        and (redis.call('HGET', key, 'cluster') or '') ~= args[i + 2] then
      if args[i + 2] == '' then
        redis.call('HDEL', key, 'cluster')
      else
        redis.call('HSET', key, 'cluster', args[i + 2])
      end
      changed = changed + 1
    end
  end
  note_reindexed(ctx.meta, changed)
  return changed
end

-- edges of a memory to its nearest, in the place of those it had
local function set_edges(ctx, id, digest, edges)
  local similar = ctx.derived.similar
  -- a pair that the other end knows of stays
  local incoming = redis.call('HGET', similar, 'i' .. id) or ''
  for _, edge in ipairs(items_in(similar, 'o' .. id)) do
    local other = string.match(edge, '^(.*)\30')
    take_from(similar, 'i' .. other, id)
    if not string.find(incoming, '\31' .. other .. '\31', 1, true) then
      redis.call('HDEL', ctx.derived.conflicts, id .. '\31' .. other, other .. '\31' .. id)
    end
  end
  local out = {}
  for _, edge in ipairs(edges) do
    out[#out + 1] = edge.other .. '\30' .. edge.cosine
    put_in(similar, 'i' .. edge.other, id)
    if edge.kind ~= '' then
      local pair = edge.is_newer and edge.other .. '\31' .. id or id .. '\31' .. edge.other
      local older, newer = digest, edge.digest
      if edge.is_newer then older, newer = newer, older end
      redis.call('HSET', ctx.derived.conflicts, pair,
        table.concat({ edge.kind, edge.cosine, edge.why, older, newer }, '\31'))
    end
  end
  redis.call('HSET', similar, 'o' .. id, '\31' .. table.concat(out, '\31') .. (#out > 0 and '\31' or ''))
end

local function join_topic(ctx, id, number)
  local key = ctx.prefix .. id
  if number == '' or redis.call('HEXISTS', key, 'cluster') == 1 then return end
  local is_topic = redis.pcall('HEXISTS', ctx.derived.cluster .. number, 'size') == 1
  -- a topic that went meanwhile has no members
  if whole(number, 1, 2 ^ 53) and not is_topic then return end
  redis.call('HSET', key, 'cluster', number)
  note_reindexed(ctx.meta, 1)
  if is_topic then
    redis.call('HINCRBY', ctx.derived.cluster .. number, 'size', 1)
    redis.call('ZINCRBY', ctx.derived.topics, 1, number)
  end
end

local function vector_digest(key, field)
  local vector = redis.call('HGET', key, field)
  return vector and string.sub(redis.sha1hex(vector), 1, 16) or ''
end

local function link(keys, args)
  local ctx, refusal = context_of(keys, args)
  if not ctx then return refusal end
  local words, at, field = {}, 3, redis.call('HGET', ctx.meta, 'vector_field') or 'embedding'
  while at <= #args do
    local id, digest, count = args[at], args[at + 1], whole(args[at + 4], 0, 100)
    if not count or #args < at + 4 + 7 * count then return misuse('rm_link: an item is cut off') end
    local now, edges = digest_of(ctx.prefix, id), {}
    for i = at + 5, at + 4 + 7 * count, 7 do
      local other, digest_then = args[i], args[i + 1]
      if digest_of(ctx.prefix, other) == digest_then and vector_digest(ctx.prefix .. other, field) == args[i + 2] then
        edges[#edges + 1] = {
          other = other, digest = digest_then, cosine = args[i + 3], kind = args[i + 4], why = args[i + 5],
          is_newer = args[i + 6] == '1',
        }
      end
    end
    local is_true = now == digest and vector_digest(ctx.prefix .. id, field) == args[at + 2]
    if is_true then
      set_edges(ctx, id, digest, edges)
      join_topic(ctx, id, args[at + 3])
      words[#words + 1] = 'OK'
    else
      words[#words + 1] = now and 'STALE' or 'GONE'
    end
    if is_true or not now then redis.call('SREM', ctx.derived.fresh, id) end
    at = at + 5 + 7 * count
  end
  return words
end

local function decay(keys, args)
  local ctx, refusal = context_of(keys, args)
  if not ctx then return refusal end
  local step, tables, changes = tonumber(args[3] or ''), {}, {}
  if not (ctx.last and step and #args <= ITEMS + 3) then return misuse('rm_decay meta D weights | prefix now_ms step, ids') end
  local function weight(kind, age_days)
    tables[kind] = tables[kind] or decoded(redis.call('HGET', ctx.last, kind) or redis.call('HGET', ctx.last, '*'))
    return tonumber(tables[kind][math.min(age_days + 1, #tables[kind])]) or 1
  end
  for i = 4, #args do
    local id = args[i]
    local raw = redis.pcall('HMGET', ctx.prefix .. id, 'importance', 'base_importance', 'pinned', 'memory_type',
      'created_at', 'updated_at', 'text')
    local importance = tonumber(raw[1] or '')
    if raw[7] and importance then
      local base, used = tonumber(raw[2] or '') or importance, redis.call('ZSCORE', ctx.derived.used, id)
      -- accesses and changes reinforce: age counts from the last
      local since_s = math.max(tonumber(raw[5] or '') or 0, tonumber(raw[6] or '') or 0, tonumber(used or '') or 0)
      local age_days = math.max(0, math.floor((ctx.now_ms / 1000 - since_s) / 86400))
      local is_pinned = raw[3] == '1' or raw[3] == 'True' or raw[3] == 'true'
      local wanted = is_pinned and base or base * weight(raw[4] or '*', age_days)
      if math.abs(wanted - importance) >= step then
        changes[#changes + 1] = { id = id, importance = string.format('%.4f', wanted), base = raw[2] or raw[1] }
      end
    end
  end
  if #changes > 0 and redis.call('HEXISTS', ctx.meta, 'generation') == 1 then
    local version = redis.call('HINCRBY', ctx.meta, 'generation', 1)
    for _, change in ipairs(changes) do
      redis.call('HSET', ctx.prefix .. change.id, 'importance', change.importance, 'base_importance', change.base,
        'version', version)
    end
    note_reindexed(ctx.meta, #changes)
  end
  return #changes
end

redis.register_function('rm_profile_v1', profile)
redis.register_function('rm_profile_set_v1', profile_set)
redis.register_function('rm_summary_v1', summary)
redis.register_function('rm_topics_v1', topics)
redis.register_function('rm_topics_end_v1', topics_end)
redis.register_function('rm_assign_v1', assign)
redis.register_function('rm_link_v1', link)
redis.register_function('rm_decay_v1', decay)
