#!lua name=redismem_read
-- Version: 4
-- Reads one owner's memories in one round trip; changes nothing but the cache of searches.
--
-- Functions (KEYS -> ARGV -> reply); those with _ro are no-writes, so replicas may run them
--   rm_search_ro_v1  alias meta turns [hot graph0 graph1 ids centroids] | prefix mode vector embedder words words_query filter
--                    unfiltered_query candidates limit timeout_ms word_weight neighbour_share other_speaker
--                    min_similarity recency_weight half_life_s importance_weight now_s explain(0/1) fields (parted
--                    by blanks) [ef staged(0/1) min_results goal excellent session is_fixed(0/1) vector32 topics]
--                    unfiltered_query is - unless the filter only hides superseded memories: it serves where
--                    there never was one, and such searches use the owner's graph, if one serves, with width ef,
--                    unless is_fixed in proportion to the graph's own; vector32: the vector as FLOAT32, or empty.
--                    topics: the vector is compared with the memories of so many of the nearest topics only
--                    With ids, many memories without filters are counted there.
--                    staged: looks at the hot set and the (escaped) session first, and goes on until timeout_ms;
--                    with min_results it ends there when so many are as near as goal and one is nearer than
--                    excellent
--                    -> NOINDEX | OK generation total note, then a hit: id score parts fields; parts is nil
--                    or similarity words semantic keyword neighbours relevance recency importance
--                    note: words, parted by blanks: EMBEDDER the store's vectors are of another embedder, words
--                    only; FILLING the index is not complete; HNSW:<ef> a graph was used; TOPICS:<n> only the
--                    nearest topics were searched by meaning; EARLY the goal was met; CUT:<parts>
--                    (of index,words,total) left out when time ended; ARCHIVED:<quarters> are not in Redis
--   rm_search_v1     alias meta turns searches [hot graph0 graph1 ids centroids] | the 21 of rm_search_ro, digest ttl_ms
--                    capacity min_generation [the others of rm_search_ro]
--                    -> NOINDEX | OK generation total note l2 or l3, ttl_ms, then the hits as above; l2: a
--                    cached search of at least that generation; l3: made now and, with a ttl_ms above 0,
--                    kept. Neither looked up nor kept: explain. Not kept: no hits, capacity 0, half of timeout_ms
--                    used, or a note that says something is missing. A cache that cannot be written is no failure
--   rm_recall_ro_v1  searches | prefix digest min_generation fields (parted by blanks)
--                    -> MISS | OK generation total ttl_ms, then the hits as above, parts nil: a cached search
--                    of at least that generation, with its memories as they are now; none may be gone
--   rm_recall_ro_v2  the same -> MISS | OK generation total note ttl_ms, then the hits
--   rm_list_ro_v1    alias meta ids | prefix filter page_filter limit last_moment last_id, fields …
--                    -> NOINDEX | OK generation total more(0/1), then id fields a memory, newest first and
--                    by id within one moment, after the last one given ('' and '': from the start)
--   rm_tails_ro_v1   turns | prefix, sessions …
--                    -> id text content_hash a session: its last turn; empty strings where there is none
--   rm_turns_ro_v1   turns | prefix, ids …
--                    -> text content_hash prev_id prev_text prev_hash an id; empty strings where gone
--
-- Complexity: rm_search O(candidates log limit) plus three FT.SEARCH (0.3-0.9 ms up to 10,000 memories);
--   the others O(items).
-- Storage: searches hash digest -> generation, total (and \30, archived quarters), then id, score a hit; joined by \31; each field has a
--   TTL (Redis 7.4; nothing is kept on an older one). Full: of five the one that expires soonest goes.
-- Derived keys: prefix .. id.
-- Limits: capacity cached searches an owner.

-- widths that callers give are meant for a graph with this EF
local PRODUCTION_EF = 128
-- memories from which they are counted by the list of ids
local MANY = 1000

-- part: check
-- part: floats

local function text17(number)
  return number and string.format('%.17g', number) or false
end

local function no_index(meta, err)
  -- RediSearch 2.10: "<name>: no such index" or "Unknown index name"; 8.x: "No such index <name>"
  local text = string.lower(err)
  if not (string.find(text, 'no such index', 1, true) or string.find(text, 'unknown index', 1, true)
      or string.find(text, 'index not found', 1, true)) then
    return redis.error_reply(err)
  end
  if redis.call('HEXISTS', meta, 'index') == 1 then return { 'NOINDEX' } end
  return nil
end

-- part: candidates

-- min-max over the candidates of one list: the best is 1, the last 0
local function scaled(scores)
  local low, high, into = math.huge, -math.huge, {}
  for _, score in pairs(scores) do
    if score < low then low = score end
    if score > high then high = score end
  end
  for id, score in pairs(scores) do
    into[id] = high > low and (score - low) / (high - low) or 1
  end
  return into
end

-- which speakers are named in the query: by one word of their name. Looked at once a speaker
local function askable(text)
  local words = {}
  for word in string.gmatch(text, '%S+') do words[word] = true end
  return setmetatable({}, { __index = function(known, speaker)
    local named = false
    for word in string.gmatch(speaker, '%S+') do named = named or words[word] or false end
    known[speaker] = named
    return named
  end })
end

-- turns next to a good one are better, and a question that names a speaker is about that speaker
local function in_conversation(fused, query)
  if next(fused) == nil or redis.call('EXISTS', query.turns) == 0 then return fused, {} end
  local ids, fields, count = {}, {}, 0
  for id in pairs(fused) do
    count = count + 1
    ids[count], fields[count] = id, 'l' .. id
  end
  local position, speakers, at, named, asked = {}, {}, {}, askable(query.words), false
  local match, number = string.match, tonumber
  local raw = redis.call('HMGET', query.turns, unpack(fields))
  for i = 1, count do
    local place, speaker = match(raw[i] or '', '^[^\31]*\31[^\31]*\31(%d+)\31([^\31]*)')
    if place then
      local here = number(place)
      position[i], speakers[i], at[here] = here, speaker, fused[ids[i]]
      asked = asked or (speaker ~= '' and named[speaker])
    end
  end
  local relevance, support, best = {}, {}, 1
  local share, square = query.share, query.share * query.share
  for i = 1, count do
    local id, here = ids[i], position[i]
    local score = fused[id]
    if here then
      local added = share * ((at[here - 1] or 0) + (at[here + 1] or 0))
        + square * ((at[here - 2] or 0) + (at[here + 2] or 0))
      score = score + added
      if query.explain then support[id] = added end
      if asked and speakers[i] ~= '' and not named[speakers[i]] then score = score * query.other_speaker end
    end
    relevance[id] = score
    if score > best then best = score end
  end
  if best > 1 then
    for id, score in pairs(relevance) do relevance[id] = score / best end
  end
  return relevance, support
end

-- the best hits in order; an insertion into a short list beats sorting all candidates
local function ranked(relevance, cosine, query, limit)
  local hits, count, weighted = {}, 0, query.recency_weight > 0 or query.importance_weight > 0
  for id, score in pairs(relevance) do
    if not query.min_similarity or (cosine[id] and cosine[id] >= query.min_similarity) then
      local recency, importance
      if weighted then
        local raw = redis.call('HMGET', query.prefix .. id, 'event_date', 'created_at', 'importance')
        local age_s = math.max(0, query.now_s - (tonumber(raw[1] or raw[2] or '') or query.now_s))
        recency, importance = 0.5 ^ (age_s / query.half_life_s), tonumber(raw[3] or '') or 0.5
        score = (1 - query.recency_weight - query.importance_weight) * score
          + query.recency_weight * recency + query.importance_weight * importance
      end
      local last = hits[count]
      if count < limit or last and (score > last.score or score == last.score and id < last.id) then
        local low, high = 1, count + 1
        while low < high do
          local middle = math.floor((low + high) / 2)
          local hit = hits[middle]
          if score > hit.score or score == hit.score and id < hit.id then high = middle else low = middle + 1 end
        end
        table.insert(hits, low, { id = id, score = score, recency = recency, importance = importance })
        if count < limit then count = count + 1 else hits[count + 1] = nil end
      end
    end
  end
  return hits
end

local function split(names)
  local fields = {}
  for name in string.gmatch(names or '', '%S+') do fields[#fields + 1] = name end
  return fields
end

local function noted(query, known)
  local words, cut = {}, {}
  if query.is_foreign then words[1] = 'EMBEDDER' end
  if known.index_state then words[#words + 1] = 'FILLING' end
  if query.by_topics then words[#words + 1] = 'TOPICS:' .. query.by_topics end
  if query.by_graph then words[#words + 1] = 'HNSW:' .. query.ef end
  if query.early then words[#words + 1] = 'EARLY' end
  for _, part in ipairs({ 'index', 'words', 'total' }) do
    if query.cut[part] then cut[#cut + 1] = part end
  end
  if #cut > 0 then words[#words + 1] = 'CUT:' .. table.concat(cut, ',') end
  local is_whole = not (query.is_foreign or known.index_state or query.early or query.by_topics or #cut > 0)
  if known.archived then words[#words + 1] = 'ARCHIVED:' .. string.gsub(known.archived, ' ', ',') end
  return table.concat(words, ' '), is_whole
end

-- relevance of every candidate, and what it is made of
local function fused(query, cosine, bm25)
  local semantic, keyword, relevance, support = {}, {}, {}, {}
  if query.mode == 'semantic' then
    for id, similarity in pairs(cosine) do
      semantic[id] = math.max(0, similarity)
      relevance[id] = semantic[id]
    end
    return relevance, semantic, keyword, support
  end
  local word_weight = query.word_weight
  semantic, keyword = scaled(cosine), scaled(bm25)
  -- a list that has no answer leaves the other alone
  if next(bm25) == nil then word_weight = 0 elseif next(cosine) == nil then word_weight = 1 end
  for id, score in pairs(semantic) do relevance[id] = (1 - word_weight) * score end
  for id, score in pairs(keyword) do relevance[id] = (relevance[id] or 0) + word_weight * score end
  if query.mode == 'hybrid' then relevance, support = in_conversation(relevance, query) end
  return relevance, semantic, keyword, support
end

-- the optional keys and arguments of a search, from where they start
local function options(query, keys, key_at, args, at)
  query.hot, query.graphs, query.ids = keys[key_at], { keys[key_at + 1], keys[key_at + 2] }, keys[key_at + 3]
  query.ef, query.staged = tonumber(args[at] or ''), query.hot and args[at + 1] == '1'
  query.min_results, query.goal = tonumber(args[at + 2] or ''), tonumber(args[at + 3] or '')
  query.excellent, query.session = tonumber(args[at + 4] or ''), args[at + 5] or ''
  query.is_fixed, query.vector32 = args[at + 6] == '1', args[at + 7] or ''
  query.centroids, query.topics = keys[key_at + 4], whole(args[at + 8], 1, 1000)
  if not (query.goal and query.excellent) then query.min_results = nil end
end

-- use the owner's graph, if one serves; widths are those of a profile of EF 128, others' are in proportion
local function take_graph(query, raw)
  local number, ef = string.match(raw or '', '^([01]) %S+ %d+ %d+ (%d+)$')
  query.graph = query.ef and number and query.graphs[number + 1]
  if query.graph and not query.is_fixed then query.ef = math.floor(query.ef * ef / PRODUCTION_EF) end
end

-- how many memories match the filter; of many, counting all of them would take a millisecond per 10,000
local function counted(query)
  local known = query.filter == '*' and query.ids and redis.call('ZCARD', query.ids) or 0
  if known >= MANY then return known end
  local found = redis.pcall('FT.SEARCH', query.alias, query.filter, 'LIMIT', 0, 0, 'TIMEOUT', search_timeout(query),
    'DIALECT', 2)
  if found.err and not is_timeout(found.err) then return nil, found.err end
  query.cut.total = found.err ~= nil or nil
  return found[1] or 0
end

-- the reply of rm_search_ro, and whether nothing is missing in it
local function found_by(keys, args, key_at, at)
  local meta = keys[2]
  local query = {
    alias = keys[1], turns = keys[3], started_s = os.clock(), cut = {},
    prefix = args[1], skip = #(args[1] or '') + 1, mode = args[2], vector = args[3], words = args[5],
    worded = args[6], filter = args[7], candidates = tonumber(args[9] or ''), limit = tonumber(args[10] or ''),
    timeout_ms = tonumber(args[11] or ''), word_weight = tonumber(args[12] or ''),
    share = tonumber(args[13] or ''), other_speaker = tonumber(args[14] or ''),
    min_similarity = tonumber(args[15] or ''), recency_weight = tonumber(args[16] or ''),
    half_life_s = tonumber(args[17] or ''), importance_weight = tonumber(args[18] or ''),
    now_s = tonumber(args[19] or ''), explain = args[20] == '1',
  }
  if not (query.turns and query.now_s and query.timeout_ms) then return misuse('rm_search_ro alias meta turns | …') end
  options(query, keys, key_at, args, at)

  local raw = redis.call('HMGET', meta, 'generation', 'embedder', 'superseded', 'index_state', 'graph', 'archived',
    'centroids')
  local known = { index_state = raw[4], archived = raw[6] }
  local generation = raw[1] or '0'
  if not raw[7] or raw[7] ~= raw[2] then query.centroids, query.topics = nil, nil end
  if args[8] ~= '-' then
    if not raw[3] then query.worded, query.filter = args[8], '*' end
    take_graph(query, raw[5])
  end
  if query.vector ~= '' and raw[2] and raw[2] ~= args[4] then query.is_foreign, query.vector = true, '' end
  if query.vector == '' then query.min_similarity = nil end
  local function failed(err) return no_index(meta, err) or { 'OK', generation, 0, (noted(query, known)) } end

  local cosine, bm25, total = by_stages(query)
  if not cosine then return failed(bm25) end
  if query.mode ~= 'keyword' then
    if left_ms(query) <= 0 or query.early then
      query.cut.total = not query.early
      total = 0
      for id in pairs(cosine) do total = total + 1 end
    else
      local err
      total, err = counted(query)
      if not total then return failed(err) end
    end
  end

  local relevance, semantic, keyword, support = fused(query, cosine, bm25)
  local hits, fields = ranked(relevance, cosine, query, query.limit), split(args[21])
  local note, is_whole = noted(query, known)
  local reply = { 'OK', generation, total or 0, note }
  for i, hit in ipairs(hits) do
    local id, place = hit.id, 4 * i
    reply[place + 1], reply[place + 2], reply[place + 3] = id, text17(hit.score), false
    if query.explain then
      reply[place + 3] = {
        text17(cosine[id]), text17(bm25[id]), text17(semantic[id] or 0), text17(keyword[id] or 0),
        text17(support[id] or 0), text17(relevance[id]), text17(hit.recency), text17(hit.importance),
      }
    end
    reply[place + 4] = redis.call('HMGET', query.prefix .. id, unpack(fields))
  end
  return reply, is_whole, known.archived
end

local function search(keys, args)
  return (found_by(keys, args, 4, 22))
end

-- the cache of searches ---------------------------------------------------------------------------

-- append what a cached search found to `reply`, behind its generation, total, note if `has_note`, `…` and TTL; nil
-- for a miss.
-- Every failure is a miss: a key or a memory of a foreign type, an unknown HPTTL.
local function recalled(searches, prefix, digest, min_generation, fields, has_note, ...)
  local raw = redis.pcall('HGET', searches, digest)
  local generation, total, archived, at = string.match(type(raw) == 'string' and raw or '',
    '^(%d+)\31(%d+)\30?([^\31]*)()')
  if not at or tonumber(generation) < min_generation then return nil end
  local ttl_ms = redis.pcall('HPTTL', searches, 'FIELDS', 1, digest)
  if ttl_ms.err or ttl_ms[1] < 0 then return nil end
  local reply = { 'OK', generation, tonumber(total) }
  if has_note then reply[4] = archived ~= '' and 'ARCHIVED:' .. archived or '' end
  for _, item in ipairs({ ... }) do reply[#reply + 1] = item end
  reply[#reply + 1] = ttl_ms[1]
  local size, count = #reply, #fields
  fields[count + 1] = 'text'
  for id, score in string.gmatch(string.sub(raw, at), '\31([^\31]*)\31([^\31]*)') do
    local values = redis.pcall('HMGET', prefix .. id, unpack(fields))
    if values.err or not values[count + 1] then return nil end
    values[count + 1] = nil
    reply[size + 1], reply[size + 2], reply[size + 3], reply[size + 4] = id, score, false, values
    size = size + 4
  end
  return reply
end

local function recall(keys, args, has_note)
  local least = whole(args[3], 0, 2 ^ 53)
  if not (keys[1] and least and args[4]) then
    return misuse('rm_recall_ro searches | prefix digest min_generation fields')
  end
  return recalled(keys[1], args[1], args[2], least, split(args[4]), has_note) or { 'MISS' }
end

-- the reply of rm_search_ro as a cached search; nil when it cannot be one
local function packed(reply, archived)
  local total = string.format('%.0f', reply[3])
  if archived then total = total .. '\30' .. string.gsub(archived, ' ', ',') end
  local parts = { reply[2], total }
  for at = 5, #reply, 4 do
    if string.find(reply[at], '\31', 1, true) then return nil end -- an id of a foreign hand
    parts[#parts + 1], parts[#parts + 2] = reply[at], reply[at + 1]
  end
  return table.concat(parts, '\31')
end

-- write: nothing below may raise ------------------------------------------------------------------

-- keep a cached search; whether it was kept
local function keep(searches, digest, value, ttl_ms, capacity)
  if redis.pcall('HEXISTS', searches, digest) == 0 and redis.pcall('HLEN', searches) >= capacity then
    local some = redis.pcall('HRANDFIELD', searches, 5)
    local left_ms, soonest = redis.pcall('HPTTL', searches, 'FIELDS', #some, unpack(some)), 1
    for i = 2, #left_ms do
      if left_ms[i] < left_ms[soonest] then soonest = i end
    end
    if some[soonest] then redis.pcall('HDEL', searches, some[soonest]) end
  end
  local set = redis.pcall('HSET', searches, digest, value)
  if type(set) == 'table' then return false end
  -- HSET took the field's TTL away
  local expires = redis.pcall('HPEXPIRE', searches, ttl_ms, 'FIELDS', 1, digest)
  if expires.err then redis.pcall('HDEL', searches, digest) end
  return not expires.err
end

local function search_or_recall(keys, args)
  local searches, digest, explain = keys[4], args[22], args[20] == '1'
  local ttl_ms, capacity, least = whole(args[23], 1, 1e10), whole(args[24], 0, 1e6), whole(args[25], 0, 2 ^ 53)
  if not (searches and ttl_ms and capacity and least) then
    return misuse('rm_search alias meta turns searches | …, digest ttl_ms capacity min_generation')
  end
  local cached = not explain
    and recalled(searches, args[1], digest, least, split(args[21]), true, 'l2')
  if cached then return cached end

  local started_s = os.clock()
  local found, is_whole, archived = found_by(keys, args, 5, 26)
  if found[1] ~= 'OK' then return found end
  -- RediSearch ends a query that runs out of time early, and does not say so; hence half the budget
  local is_sure = is_whole and (os.clock() - started_s) * 2000 < (tonumber(args[11]) or 0)
  -- nothing found costs little to find again, and what is written next must not stay hidden behind it
  local value = is_sure and not explain and capacity > 0 and #found > 4 and packed(found, archived)
  local kept = value and keep(searches, digest, value, ttl_ms, capacity)
  local reply = { 'OK', found[2], found[3], found[4], 'l3', kept and ttl_ms or 0 }
  for i = 5, #found do reply[i + 2] = found[i] end
  return reply
end

-- lists -------------------------------------------------------------------------------------------

-- ids with their moments, newest first; ids of one moment in no order
local function newest(alias, page, count)
  local found = redis.pcall('FT.SEARCH', alias, page, 'NOCONTENT', 'SORTBY', 'created_at', 'DESC',
    'LIMIT', 0, count, 'DIALECT', 2)
  if found.err then return nil, found end
  local rows = {}
  for i = 2, #found do
    local moment = tonumber(redis.call('HGET', found[i], 'created_at') or '') or -math.huge
    rows[#rows + 1] = { key = found[i], moment = moment }
  end
  return rows
end

local function later(a, b)
  if a.moment ~= b.moment then return a.moment > b.moment end
  return a.key < b.key
end

local function list(keys, args)
  local alias, meta, ids, prefix, filter, page = keys[1], keys[2], keys[3], args[1], args[2], args[3]
  local limit, last_moment, last_id = tonumber(args[4] or ''), tonumber(args[5] or ''), args[6]
  if not (ids and limit and last_id) then return misuse('rm_list_ro alias meta ids | …') end
  local generation = redis.call('HGET', meta, 'generation') or '0'
  local counted = redis.pcall('FT.SEARCH', alias, filter, 'LIMIT', 0, 0, 'DIALECT', 2)
  if counted.err then return no_index(meta, counted.err) or { 'OK', generation, 0, 0 } end

  -- the order within one moment is ours, so the group at either end of the page is fetched whole
  local count = limit + 1 + (last_moment and redis.call('ZCOUNT', ids, args[5], args[5]) or 0)
  local rows, err = newest(alias, page, count)
  if rows and #rows == count then
    local moment = string.format('%.17g', rows[count].moment)
    local group = rows[count].moment > -math.huge and redis.call('ZCOUNT', ids, moment, moment) or 0
    if group > 1 then rows, err = newest(alias, page, count + group) end
  end
  if not rows then return err end
  table.sort(rows, later)
  local kept = {}
  for _, row in ipairs(rows) do
    if row.moment ~= last_moment or row.key > prefix .. last_id then kept[#kept + 1] = row end
  end
  local reply = { 'OK', generation, counted[1], #kept > limit and 1 or 0 }
  for i = 1, math.min(limit, #kept) do
    reply[#reply + 1] = string.sub(kept[i].key, #prefix + 1)
    reply[#reply + 1] = redis.call('HMGET', kept[i].key, unpack(args, 7))
  end
  return reply
end

local function tails(keys, args)
  local turns, prefix, reply = keys[1], args[1], {}
  for i = 2, #args do
    local tail = redis.call('HGET', turns, 't' .. args[i])
    local id = tail and string.match(tail, '^[^\31]*') or ''
    local raw = tail and redis.call('HMGET', prefix .. id, 'text', 'content_hash') or {}
    for _, item in ipairs({ id, raw[1] or '', raw[2] or '' }) do reply[#reply + 1] = item end
  end
  return reply
end

local function turns(keys, args)
  local prefix, reply = args[1], {}
  for i = 2, #args do
    local raw = redis.call('HMGET', prefix .. args[i], 'text', 'content_hash')
    local link = redis.call('HGET', keys[1], 'l' .. args[i])
    local previous = link and string.match(link, '^[^\31]*') or ''
    local before = previous ~= '' and redis.call('HMGET', prefix .. previous, 'text', 'content_hash') or {}
    for _, item in ipairs({ raw[1] or '', raw[2] or '', previous, before[1] or '', before[2] or '' }) do
      reply[#reply + 1] = item
    end
  end
  return reply
end

redis.register_function { function_name = 'rm_search_ro_v1', callback = search, flags = { 'no-writes' } }
redis.register_function { function_name = 'rm_recall_ro_v1', callback = recall, flags = { 'no-writes' } }
redis.register_function {
  function_name = 'rm_recall_ro_v2',
  callback = function(keys, args) return recall(keys, args, true) end,
  flags = { 'no-writes' },
}
redis.register_function('rm_search_v1', search_or_recall)
redis.register_function { function_name = 'rm_list_ro_v1', callback = list, flags = { 'no-writes' } }
redis.register_function { function_name = 'rm_tails_ro_v1', callback = tails, flags = { 'no-writes' } }
redis.register_function { function_name = 'rm_turns_ro_v1', callback = turns, flags = { 'no-writes' } }
