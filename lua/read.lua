#!lua name=redismem_read
-- Version: 1
-- Reads one owner's memories in one round trip; changes nothing, so replicas may run it.
--
-- Functions (KEYS -> ARGV -> reply), all no-writes
--   rm_search_ro_v1  alias meta turns | prefix mode vector embedder words words_query filter
--                    unfiltered_query candidates limit timeout_ms word_weight neighbour_share other_speaker min_similarity recency_weight half_life_s
--                    importance_weight now_s explain(0/1) fields (parted by blanks); unfiltered_query is -
--                    unless the filter only hides superseded memories: it serves where there never was one
--                    -> NOINDEX | OK generation total note, then a hit: id score parts fields; parts is nil
--                    or similarity words semantic keyword neighbours relevance recency importance;
--                    note EMBEDDER: the store's vectors are of another embedder, words only
--   rm_list_ro_v1    alias meta ids | prefix filter page_filter limit last_moment last_id, fields …
--                    -> NOINDEX | OK generation total more(0/1), then id fields a memory, newest first and
--                    by id within one moment, after the last one given ('' and '': from the start)
--   rm_tails_ro_v1   turns | prefix, sessions …
--                    -> id text content_hash a session: its last turn; empty strings where there is none
--   rm_turns_ro_v1   turns | prefix, ids …
--                    -> text content_hash prev_id prev_text prev_hash an id; empty strings where gone
--
-- Complexity: rm_search O(candidates log candidates) plus two FT.SEARCH (0.3-0.9 ms up to 10,000 memories);
--   the others O(items). Derived keys: prefix .. id.

local function misuse(text)
  return redis.error_reply('RMEM_USAGE ' .. text)
end

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

-- FT.SEARCH for the candidates nearest to the vector: id -> cosine
local function nearest(query)
  local base = query.filter == '*' and '*' or '(' .. query.filter .. ')'
  local found = redis.pcall('FT.SEARCH', query.alias,
    base .. '=>[KNN ' .. query.candidates .. ' @embedding $v AS d]', 'PARAMS', 2, 'v', query.vector,
    'RETURN', 1, 'd', 'LIMIT', 0, query.candidates, 'TIMEOUT', query.timeout_ms, 'DIALECT', 2)
  if found.err then return nil, found.err end
  local cosine = {}
  for i = 2, #found, 2 do
    -- from 8.8 on a result may come without its fields: it has just gone. FLOAT16 rounds past 1.
    local distance = found[i + 1] and tonumber(found[i + 1][2] or '')
    if distance then cosine[string.sub(found[i], query.skip)] = math.max(-1, math.min(1, 1 - distance)) end
  end
  return cosine, found[1]
end

-- FT.SEARCH for the candidates with the words: id -> BM25 score
local function worded(query)
  local found = redis.pcall('FT.SEARCH', query.alias, query.worded, 'NOCONTENT', 'WITHSCORES', 'SCORER', 'BM25STD',
    'LIMIT', 0, query.candidates, 'TIMEOUT', query.timeout_ms, 'DIALECT', 2)
  if found.err then return nil, found.err end
  local score = {}
  for i = 2, #found, 2 do score[string.sub(found[i], query.skip)] = tonumber(found[i + 1]) end
  return score, found[1]
end

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

-- whether one of the words of a name stands in the query
local function named(speaker, words)
  for word in string.gmatch(speaker, '%S+') do
    if words[word] then return true end
  end
  return false
end

-- turns next to a good one are better, and a question that names a speaker is about that speaker
local function in_conversation(fused, query)
  local ids, fields, at, speakers, relevance = {}, {}, {}, {}, {}
  for id in pairs(fused) do
    ids[#ids + 1] = id
    fields[#fields + 1] = 'l' .. id
  end
  if #ids == 0 or redis.call('EXISTS', query.turns) == 0 then return fused, {} end
  local position, asked, words = {}, false, {}
  for word in string.gmatch(query.words, '%S+') do words[word] = true end
  for i, raw in ipairs(redis.call('HMGET', query.turns, unpack(fields))) do
    if raw then
      local place, speaker = string.match(raw, '^[^\31]*\31[^\31]*\31(%d+)\31([^\31]*)')
      position[ids[i]], at[tonumber(place)] = tonumber(place), fused[ids[i]]
      if speaker ~= '' then
        speakers[ids[i]] = named(speaker, words)
        asked = asked or speakers[ids[i]]
      end
    end
  end
  local support, best = {}, 1
  for _, id in ipairs(ids) do
    local here, score = position[id], fused[id]
    if here then
      local added = query.share * ((at[here - 1] or 0) + (at[here + 1] or 0))
        + query.share * query.share * ((at[here - 2] or 0) + (at[here + 2] or 0))
      support[id], score = added, score + added
      if asked and speakers[id] == false then score = score * query.other_speaker end
    end
    relevance[id] = score
    if score > best then best = score end
  end
  for id, score in pairs(relevance) do relevance[id] = score / best end
  return relevance, support
end

local function before(a, b)
  if a.score ~= b.score then return a.score > b.score end
  return a.id < b.id
end

-- the best hits in order; an insertion into a short list beats sorting all candidates
local function ranked(relevance, cosine, query, limit)
  local hits = {}
  for id, score in pairs(relevance) do
    if not query.min_similarity or (cosine[id] and cosine[id] >= query.min_similarity) then
      local hit = { id = id, score = score }
      if query.recency_weight > 0 or query.importance_weight > 0 then
        local raw = redis.call('HMGET', query.prefix .. id, 'event_date', 'created_at', 'importance')
        local age_s = math.max(0, query.now_s - (tonumber(raw[1] or raw[2] or '') or query.now_s))
        hit.recency, hit.importance = 0.5 ^ (age_s / query.half_life_s), tonumber(raw[3] or '') or 0.5
        hit.score = (1 - query.recency_weight - query.importance_weight) * score
          + query.recency_weight * hit.recency + query.importance_weight * hit.importance
      end
      local at = #hits + 1
      while at > 1 and before(hit, hits[at - 1]) do at = at - 1 end
      if at <= limit then
        table.insert(hits, at, hit)
        hits[limit + 1] = nil
      end
    end
  end
  return hits
end

local function search(keys, args)
  local meta = keys[2]
  local query = {
    alias = keys[1], turns = keys[3],
    prefix = args[1], skip = #(args[1] or '') + 1, mode = args[2], vector = args[3], words = args[5],
    worded = args[6], filter = args[7], candidates = tonumber(args[9] or ''), timeout_ms = args[11],
    share = tonumber(args[13] or ''), other_speaker = tonumber(args[14] or ''),
    min_similarity = tonumber(args[15] or ''), recency_weight = tonumber(args[16] or ''),
    half_life_s = tonumber(args[17] or ''), importance_weight = tonumber(args[18] or ''),
    now_s = tonumber(args[19] or ''),
  }
  local limit, word_weight, explain = tonumber(args[10] or ''), tonumber(args[12] or ''), args[20] == '1'
  if not (query.turns and query.now_s) then return misuse('rm_search_ro alias meta turns | …') end

  local known = redis.call('HMGET', meta, 'generation', 'embedder', 'superseded')
  if args[8] ~= '-' and not known[3] then query.worded, query.filter = args[8], '*' end
  local generation, note = known[1] or '0', ''
  if query.vector ~= '' and known[2] and known[2] ~= args[4] then note, query.vector = 'EMBEDDER', '' end
  if query.vector == '' then query.min_similarity = nil end
  local function failed(err) return no_index(meta, err) or { 'OK', generation, 0, note } end

  local cosine, bm25, near, total = {}, {}, nil, nil
  if query.vector ~= '' then
    cosine, near = nearest(query)
    if not cosine then return failed(near) end
  end
  if query.worded ~= '' and query.mode ~= 'semantic' then
    bm25, total = worded(query)
    if not bm25 then return failed(total) end
  end
  if query.mode ~= 'keyword' then
    local counted = redis.pcall('FT.SEARCH', query.alias, query.filter, 'LIMIT', 0, 0, 'DIALECT', 2)
    if counted.err then return failed(counted.err) end
    total = counted[1]
  end

  local semantic, keyword, relevance, support = {}, {}, {}, {}
  if query.mode == 'semantic' then
    for id, similarity in pairs(cosine) do
      semantic[id] = math.max(0, similarity)
      relevance[id] = semantic[id]
    end
  else
    semantic, keyword = scaled(cosine), scaled(bm25)
    -- a list that has no answer leaves the other alone
    if next(bm25) == nil then word_weight = 0 elseif next(cosine) == nil then word_weight = 1 end
    for id, score in pairs(semantic) do relevance[id] = (1 - word_weight) * score end
    for id, score in pairs(keyword) do relevance[id] = (relevance[id] or 0) + word_weight * score end
    if query.mode == 'hybrid' then relevance, support = in_conversation(relevance, query) end
  end

  local hits, fields = ranked(relevance, cosine, query, limit), {}
  for name in string.gmatch(args[21] or '', '%S+') do fields[#fields + 1] = name end
  local reply = { 'OK', generation, total or 0, note }
  for i, hit in ipairs(hits) do
    local id, at = hit.id, 4 * i
    reply[at + 1], reply[at + 2], reply[at + 3] = id, text17(hit.score), false
    if explain then
      reply[at + 3] = {
        text17(cosine[id]), text17(bm25[id]), text17(semantic[id] or 0), text17(keyword[id] or 0),
        text17(support[id] or 0), text17(relevance[id]), text17(hit.recency), text17(hit.importance),
      }
    end
    reply[at + 4] = redis.call('HMGET', query.prefix .. id, unpack(fields))
  end
  return reply
end

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
redis.register_function { function_name = 'rm_list_ro_v1', callback = list, flags = { 'no-writes' } }
redis.register_function { function_name = 'rm_tails_ro_v1', callback = tails, flags = { 'no-writes' } }
redis.register_function { function_name = 'rm_turns_ro_v1', callback = turns, flags = { 'no-writes' } }
