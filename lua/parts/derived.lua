-- Part of several libraries (`-- part: derived`): derived data goes with what it was made from, and jobs that make
-- it anew are queued in the same step. ctx holds prefix, meta, now_ms and `derived` (nil from a caller of an older
-- version, whose changes the readers of derived data notice). Needs `-- part: check`. Nothing here raises.
-- Storage: see lua/derive.lua; later zset "<tag> <kind>" -> ms from which the job may start.

-- ms until a job of a kind starts: soon after a change that shows, later where changes may gather
local SOON, MINUTES, HOUR = 1000, 300000, 3600000
local EMBED = 5000
-- new memories from which topics are made anew
local CLUSTER_AFTER = 100
-- importance from which a memory changes the profile at once
local SIGNIFICANT = 0.8
-- entities of one memory that get a summary
local ENTITIES = 16

-- the further KEYS of a caller: made profile similar conflicts fresh used topics summaries, two prefixes of keys, later
local function derived_keys(keys, at)
  if not keys[at + 10] then return nil end
  return {
    made = keys[at], profile = keys[at + 1], similar = keys[at + 2], conflicts = keys[at + 3], fresh = keys[at + 4],
    used = keys[at + 5], topics = keys[at + 6], summaries = keys[at + 7], summary = keys[at + 8],
    cluster = keys[at + 9], later = keys[at + 10],
  }
end

local function wrong_derived(derived, prefix)
  if derived and not string.find(prefix or '', '{[^}]*}') then return misuse('the prefix has no {tag}') end
  return derived and (wrong_type(derived.made, 'hash') or wrong_type(derived.profile, 'hash')
    or wrong_type(derived.similar, 'hash') or wrong_type(derived.conflicts, 'hash')
    or wrong_type(derived.fresh, 'set') or wrong_type(derived.used, 'zset') or wrong_type(derived.topics, 'zset')
    or wrong_type(derived.summaries, 'zset') or wrong_type(derived.later, 'zset'))
end

-- RediSearch indexes a memory anew whatever field of it changes, and counts the words of the old version on (see
-- rm_refresh_begin): count what was indexed anew
local function note_reindexed(meta, count)
  if count > 0 and redis.call('HEXISTS', meta, 'index') == 1 then redis.call('HINCRBY', meta, 'reindexed', count) end
end

-- queue one job of a kind for the owner; one that waits already starts at the earlier moment
local function queue(ctx, kind, delay_ms)
  local tag = string.match(ctx.prefix, '{([^}]*)}')
  redis.call('ZADD', ctx.derived.later, 'LT', string.format('%.0f', ctx.now_ms + delay_ms), tag .. ' ' .. kind)
end

-- what a memory says, in 16 characters; nil when it is gone or superseded
local function digest_of(prefix, id)
  local raw = redis.pcall('HMGET', prefix .. id, 'text', 'topics', 'entities', 'event_date', 'superseded_by')
  if not raw[1] or raw[5] then return nil end
  local said = { raw[1], raw[2] or '', raw[3] or '', raw[4] or '' }
  return string.sub(redis.sha1hex(table.concat(said, '\31')), 1, 16)
end

local function decoded(text)
  local ok, value = pcall(cjson.decode, text or '')
  return ok and type(value) == 'table' and value or {}
end

-- sets of short strings, kept in a field of a hash as \31a\31b\31
local function put_in(key, field, item)
  local raw = redis.call('HGET', key, field) or '\31'
  if not string.find(raw, '\31' .. item .. '\31', 1, true) then redis.call('HSET', key, field, raw .. item .. '\31') end
end

local function take_from(key, field, item)
  local raw = redis.call('HGET', key, field)
  local first, last = string.find(raw or '', '\31' .. item .. '\31', 1, true)
  if not first then return end
  raw = string.sub(raw, 1, first) .. string.sub(raw, last + 1)
  if raw == '\31' then redis.call('HDEL', key, field) else redis.call('HSET', key, field, raw) end
end

local function items_in(key, field)
  local items = {}
  for item in string.gmatch(redis.call('HGET', key, field) or '', '[^\31]+') do items[#items + 1] = item end
  return items
end

local function unname(ctx, name, sources)
  for _, id in ipairs(decoded(sources)) do take_from(ctx.derived.made, id, name) end
end

-- what is derived goes; what a caller set stays
local function drop_profile(ctx)
  local key = ctx.derived.profile
  local raw = redis.call('HMGET', key, 'sources', 'patched')
  unname(ctx, 'profile', raw[1])
  local patched = decoded(raw[2])
  for _, field in ipairs(redis.call('HKEYS', key)) do
    if field ~= 'patched' and patched[field] == nil then redis.call('HDEL', key, field) end
  end
end

local function drop_summary(ctx, name)
  local key = ctx.derived.summary .. name
  if redis.call('TYPE', key).ok == 'hash' then unname(ctx, 'summary:' .. name, redis.call('HGET', key, 'sources')) end
  redis.call('UNLINK', key)
  redis.call('ZREM', ctx.derived.summaries, name)
end

-- words of a topic that no other member is known to have go from its label; returns what is left of them
local function drop_witness(ctx, number, gone)
  local key, kept, shown = ctx.derived.cluster .. number, {}, {}
  if redis.call('TYPE', key).ok ~= 'hash' then return kept end
  for _, entry in ipairs(decoded(redis.call('HGET', key, 'words'))) do
    local witnesses = {}
    for _, id in ipairs(entry[2] or {}) do
      if not gone[id] then witnesses[#witnesses + 1] = id end
    end
    if #witnesses > 0 then
      kept[#kept + 1] = { entry[1], witnesses }
      if #shown < 3 then shown[#shown + 1] = entry[1] end
    end
  end
  local digests = decoded(redis.call('HGET', key, 'digests'))
  for id in pairs(gone) do digests[id] = nil end
  redis.call('HSET', key, 'words', #kept > 0 and cjson.encode(kept) or '[]', 'label', table.concat(shown, ', '),
    'digests', next(digests) and cjson.encode(digests) or '{}')
  return kept
end

-- edges are kept at both ends: o<id> ids and cosines of its nearest, i<id> ids that have it among theirs
local function unlink_similar(ctx, id)
  local similar, conflicts = ctx.derived.similar, ctx.derived.conflicts
  local function part(other)
    redis.call('HDEL', conflicts, id .. '\31' .. other, other .. '\31' .. id)
  end
  for _, edge in ipairs(items_in(similar, 'o' .. id)) do
    local other = string.match(edge, '^(.*)\30')
    take_from(similar, 'i' .. other, id)
    part(other)
  end
  for _, other in ipairs(items_in(similar, 'i' .. id)) do
    for _, edge in ipairs(items_in(similar, 'o' .. other)) do
      if string.match(edge, '^(.*)\30') == id then take_from(similar, 'o' .. other, edge) end
    end
    part(other)
  end
  redis.call('HDEL', similar, 'o' .. id, 'i' .. id)
end

-- everything made from a memory goes, and what shows is made again; call it before the memory changes
local function unmake(ctx, id)
  local derived = ctx.derived
  if not derived then return end
  for _, name in ipairs(items_in(derived.made, id)) do
    local kind, rest = string.match(name, '^(%l+):?(.*)$')
    if kind == 'profile' then
      drop_profile(ctx)
      queue(ctx, name, SOON)
    elseif kind == 'summary' then
      drop_summary(ctx, rest)
      queue(ctx, name, SOON)
    elseif kind == 'cluster' then
      drop_witness(ctx, rest, { [id] = true })
    end
  end
  redis.call('HDEL', derived.made, id)
  unlink_similar(ctx, id)
  redis.call('SREM', derived.fresh, id)
end

-- a memory that goes, or is about something else from now on, leaves its topic
local function leave_topic(ctx, id)
  local derived = ctx.derived
  if not derived then return end
  local number = redis.call('HGET', ctx.prefix .. id, 'cluster')
  if not number then return end
  redis.call('HDEL', ctx.prefix .. id, 'cluster')
  if redis.pcall('HEXISTS', derived.cluster .. number, 'size') == 1 then
    redis.call('HINCRBY', derived.cluster .. number, 'size', -1)
    redis.call('ZINCRBY', derived.topics, -1, number)
  end
end

-- queue what a memory that was written makes necessary
local function note_written(ctx, id, values, has_vector)
  local derived = ctx.derived
  if not derived then return end
  if values.superseded_by then return end
  if has_vector then
    redis.call('SADD', derived.fresh, id)
    queue(ctx, 'link', SOON)
  else
    queue(ctx, 'embed', EMBED)
  end
  local is_significant = values.pinned == '1' or (tonumber(values.importance or '') or 0) >= SIGNIFICANT
  queue(ctx, 'profile', is_significant and SOON or MINUTES)
  queue(ctx, 'topics', redis.call('HINCRBY', ctx.meta, 'unclustered', 1) >= CLUSTER_AFTER and SOON or HOUR)
  queue(ctx, 'periods', HOUR)
  local count = 0
  for entity in string.gmatch(values.entities or '', '[^|]+') do
    count = count + 1
    if count <= ENTITIES then queue(ctx, 'summary:entity:' .. entity, HOUR) end
  end
end

-- the same where only importance or confidence changed
local function note_weighed(ctx, values)
  if not ctx.derived then return end
  queue(ctx, 'profile', (tonumber(values.importance or '') or 0) >= SIGNIFICANT and SOON or MINUTES)
end

-- the same for a memory that got its vector; a new one is of another hand
local function note_embedded(ctx, id, is_new)
  if not ctx.derived then return end
  if is_new then
    local raw = redis.call('HMGET', ctx.prefix .. id, 'pinned', 'importance', 'entities')
    note_written(ctx, id, { pinned = raw[1], importance = raw[2] or nil, entities = raw[3] or nil }, true)
  else
    redis.call('SADD', ctx.derived.fresh, id)
    queue(ctx, 'link', SOON)
  end
end
