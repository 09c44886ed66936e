#!lua name=redismem_views
-- Version: 2
-- Reads what is derived of one owner's memories; what a source has left, whoever took it, is not shown. Writes nothing.
--
-- Functions (KEYS -> ARGV -> reply); all are no-writes, so replicas may run them
--   rm_profile_ro_v1    meta profile | prefix -> generation known(0/1) fields …: 0: there are no memories; where a
--                       source is gone or changed, only `patched` and what it names
--   rm_summary_ro_v1    summary | prefix -> fields …; none where there is no summary or a source is gone or changed
--   rm_topics_ro_v1     meta ids topics alias | prefix cluster_prefix summary_prefix limit
--                       -> generation memories categorized, (number size words summary) …: the largest topics; words:
--                       JSON, without those that no memory is known to have any more
--   rm_similar_ro_v1    alias meta similar conflicts | prefix id limit
--                       -> MISSING | OK precomputed(0/1), (id cosine text kind why) …, nearest first
--   rm_conflicts_ro_v1  conflicts | prefix limit -> total, (kind older newer cosine why older_text newer_text) …:
--                       contradictions first, then the most similar
--
-- Complexity: O(sources) to compare them (10 us each); similar: O(edges), or one FT.SEARCH where edges are not made yet.
-- Storage: see lua/derive.lua. Derived keys: prefix .. id, cluster_prefix .. number, summary_prefix .. name.
-- Limits: 200 incoming edges of a memory are looked at, 2,000 conflicts of an owner.

local INCOMING = 200
local CONFLICTS = 2000
local FLAG = '^([^\31]*)\31([^\31]*)\31([^\31]*)\31([^\31]*)\31([^\31]*)$'

-- part: check
-- part: derived

-- part: shown

local function profile(keys, args)
  if not (keys[2] and args[1]) then return misuse('rm_profile_ro meta profile | prefix') end
  local generation, values, kept = redis.call('HGET', keys[1], 'generation'), fields_of(keys[2]), nil
  if not is_true(args[1], values.sources, values.digests) then
    kept = decoded(values.patched)
    kept.patched = true
  end
  return { generation or '0', generation and 1 or 0, unpack(flat_of(values, kept)) }
end

local function summary(keys, args)
  if not (keys[1] and args[1]) then return misuse('rm_summary_ro summary | prefix') end
  local values = fields_of(keys[1])
  return is_true(args[1], values.sources, values.digests) and flat_of(values) or {}
end

-- how many memories were not superseded
local function current(alias, meta, ids)
  local count = redis.call('ZCARD', ids)
  if redis.call('HEXISTS', meta, 'superseded') == 0 then return count end
  local found = redis.pcall('FT.SEARCH', alias, 'ismissing(@superseded_by)', 'LIMIT', 0, 0, 'DIALECT', 2)
  return found.err and count or found[1]
end

local function topics(keys, args)
  local meta, ids, by_size, prefix = keys[1], keys[2], keys[3], args[1]
  local limit = whole(args[4], 1, 1000)
  if not (keys[4] and limit) then return misuse('rm_topics_ro meta ids topics alias | prefix … limit') end
  local categorized, sizes = 0, redis.call('ZREVRANGE', by_size, 0, -1, 'WITHSCORES')
  for i = 2, #sizes, 2 do categorized = categorized + tonumber(sizes[i]) end
  local reply = { redis.call('HGET', meta, 'generation') or '0', current(keys[4], meta, ids), categorized }
  for i = 1, math.min(#sizes, 2 * limit), 2 do
    local number = sizes[i]
    local shown = label_words(prefix, args[2] .. number)
    local told = fields_of(args[3] .. 'topic:' .. number)
    local text = is_true(prefix, told.sources, told.digests) and told.text or ''
    for _, item in ipairs({ number, sizes[i + 1], #shown > 0 and cjson.encode(shown) or '[]', text }) do
      reply[#reply + 1] = item
    end
  end
  return reply
end

local function text_of(prefix, id)
  local raw = redis.pcall('HMGET', prefix .. id, 'text', 'superseded_by')
  return raw[1] and not raw[2] and raw[1] or nil
end

-- cosines of what is linked with a memory, either way
local function neighbours(similar, id)
  local cosines = {}
  for _, edge in ipairs(items_in(similar, 'o' .. id)) do
    local other, cosine = string.match(edge, '^(.*)\30(.*)$')
    cosines[other] = cosine
  end
  for i, other in ipairs(items_in(similar, 'i' .. id)) do
    if i > INCOMING then break end
    for _, edge in ipairs(cosines[other] and {} or items_in(similar, 'o' .. other)) do
      local linked, cosine = string.match(edge, '^(.*)\30(.*)$')
      if linked == id then cosines[other] = cosine end
    end
  end
  return cosines
end

-- the same for a memory that is not linked yet; nothing where it has no vector
local function searched(alias, prefix, id, vector, limit)
  local cosines = {}
  if not vector then return cosines end
  local query = '(ismissing(@superseded_by))=>[KNN ' .. limit + 1 .. ' @embedding $v AS d]'
  local found = redis.pcall('FT.SEARCH', alias, query, 'PARAMS', 2, 'v', vector, 'RETURN', 1, 'd', 'LIMIT', 0, limit + 1, 'DIALECT', 2)
  for i = 2, found.err and 0 or #found, 2 do
    local other, distance = string.sub(found[i], #prefix + 1), found[i + 1] and tonumber(found[i + 1][2] or '')
    if distance and other ~= id then cosines[other] = string.format('%.4f', math.min(1, 1 - distance)) end
  end
  return cosines
end

local function flag_of(conflicts, id, other)
  local raw = redis.call('HGET', conflicts, id .. '\31' .. other) or redis.call('HGET', conflicts, other .. '\31' .. id)
  local kind, _, why = string.match(raw or '', FLAG)
  return kind or '', why or ''
end

local function similar(keys, args)
  local alias, meta, edges, conflicts, prefix, id = keys[1], keys[2], keys[3], keys[4], args[1], args[2]
  local limit = whole(args[3], 1, 100)
  if not (conflicts and limit) then return misuse('rm_similar_ro alias meta similar conflicts | prefix id limit') end
  local field = redis.call('HGET', meta, 'vector_field') or 'embedding'
  local raw = redis.pcall('HMGET', prefix .. id, 'text', field)
  if not raw[1] then return { 'MISSING' } end
  local is_linked = redis.call('HEXISTS', edges, 'o' .. id)
  local cosines = is_linked == 1 and neighbours(edges, id) or searched(alias, prefix, id, raw[2], limit)
  local order, reply = {}, { 'OK', is_linked }
  for other, cosine in pairs(cosines) do order[#order + 1] = { other, tonumber(cosine) or 0 } end
  table.sort(order, function(a, b) return a[2] > b[2] or a[2] == b[2] and a[1] < b[1] end)
  for _, entry in ipairs(order) do
    local text = #reply < 2 + 5 * limit and text_of(prefix, entry[1])
    if text then
      local kind, why = flag_of(conflicts, id, entry[1])
      for _, item in ipairs({ entry[1], cosines[entry[1]], text, kind, why }) do reply[#reply + 1] = item end
    end
  end
  return reply
end

local function conflicts(keys, args)
  local limit = whole(args[2], 1, 500)
  if not (keys[1] and limit) then return misuse('rm_conflicts_ro conflicts | prefix limit') end
  local pairs_, reply = {}, { redis.call('HLEN', keys[1]) }
  local flat = redis.call('HGETALL', keys[1])
  for i = 1, math.min(#flat, 2 * CONFLICTS), 2 do
    local kind, cosine, why, old, new = string.match(flat[i + 1], FLAG)
    if kind then pairs_[#pairs_ + 1] = { flat[i], kind, cosine, why, old, new } end
  end
  table.sort(pairs_, function(a, b)
    if a[2] ~= b[2] then return a[2] < b[2] end
    local one, other = tonumber(a[3]) or 0, tonumber(b[3]) or 0
    return one > other or one == other and a[1] < b[1]
  end)
  for _, pair in ipairs(pairs_) do
    if #reply >= 1 + 7 * limit then break end
    local older, newer = string.match(pair[1], '^([^\31]*)\31(.*)$')
    local is_both = digest_of(args[1], older) == pair[5] and digest_of(args[1], newer) == pair[6]
    local old_text, new_text = text_of(args[1], older), text_of(args[1], newer)
    if is_both and old_text and new_text then
      local told = { pair[2], older, newer, pair[3], pair[4], old_text, new_text }
      for _, item in ipairs(told) do reply[#reply + 1] = item end
    end
  end
  return reply
end

local function reader(name, callback)
  redis.register_function { function_name = name, callback = callback, flags = { 'no-writes' } }
end

reader('rm_profile_ro_v1', profile)
reader('rm_summary_ro_v1', summary)
reader('rm_topics_ro_v1', topics)
reader('rm_similar_ro_v1', similar)
reader('rm_conflicts_ro_v1', conflicts)
