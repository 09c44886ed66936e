-- Part of redismem_read (`-- part: candidates`): which memories a search considers, within its time.
-- A query is the table that found_by makes. Candidates are cosine: id -> similarity, and bm25: id -> score.

-- hot memories that a staged search looks at first: what a conversation uses
local HOT_FIRST = 100
-- topics that a staged search looks at before everything, of users with so many memories
local NEAREST_TOPICS, LARGE = 3, 5000

-- a TAG query for memories with one of the ids
local function one_of(ids)
  local escaped = {}
  for i, id in ipairs(ids) do escaped[i] = string.gsub(id, '[^%w\128-\255]', '\\%0') end
  return '@pk:{' .. table.concat(escaped, '|') .. '}'
end

-- milliseconds of the budget that are left, by CPU time: TIME stands still in a Function
local function left_ms(query)
  return query.timeout_ms - (os.clock() - query.started_s) * 1000
end

local function search_timeout(query)
  return string.format('%.0f', math.max(1, left_ms(query)))
end

-- RediSearch 2.10: a KNN that runs out of time is an error, other queries return what they have
local function is_timeout(err)
  return string.find(string.lower(err), 'timeout limit', 1, true)
end

-- memories of the topics nearest to the vector and, of those in no topic, the ones that these are nearest to; nil
-- without topics. Everything else is left out: an inverted file, where the lists are the user's topics
local function near_topics(query, count)
  local vector = query.vector32 ~= '' and query.vector32 or float32(query.vector)
  local near = redis.pcall('VSIM', query.centroids, 'FP32', vector, 'COUNT', count)
  if near.err or #near == 0 then return nil end
  local names = {}
  for _, number in ipairs(near) do names[#names + 1] = number .. '|near\\-' .. number end
  return '@cluster:{' .. table.concat(names, '|') .. '}'
end

-- what to look through for the nearest: the topics that are asked for, or all that match the filter, or of those
-- what the graph proposes. The exact index then scores, so that 8-bit vectors cost recall only, and what another
-- hand deleted is not found
local function vicinity(query)
  local topics = query.topics and near_topics(query, query.topics)
  if topics then
    query.by_topics = query.topics
    return query.filter == '*' and topics or topics .. ' ' .. query.filter, false
  end
  if query.graph then
    local count = math.max(query.limit, math.min(query.candidates, query.ef))
    local vector = query.vector32 ~= '' and query.vector32 or float32(query.vector)
    local near = redis.pcall('VSIM', query.graph, 'FP32', vector, 'COUNT', count, 'EF', query.ef)
    if not near.err and #near > 0 then
      return query.filter == '*' and one_of(near) or one_of(near) .. ' ' .. query.filter, true
    end
  end
  return query.filter, false
end

-- FT.SEARCH for the candidates nearest to the vector: id -> cosine
local function nearest(query)
  local filter, by_graph = vicinity(query)
  local base = filter == '*' and '*' or '(' .. filter .. ')'
  local found = redis.pcall('FT.SEARCH', query.alias,
    base .. '=>[KNN ' .. query.candidates .. ' @embedding $v AS d]', 'PARAMS', 2, 'v', query.vector,
    'RETURN', 1, 'd', 'LIMIT', 0, query.candidates, 'TIMEOUT', search_timeout(query), 'DIALECT', 2)
  if found.err and not is_timeout(found.err) then return nil, found.err end
  if found.err then
    query.cut.index = true
    return {}
  end
  local cosine, skip, sub, number = {}, query.skip, string.sub, tonumber
  for i = 2, #found, 2 do
    -- from 8.8 on a result may come without its fields: it has just gone. FLOAT16 rounds past 1.
    local distance = found[i + 1] and number(found[i + 1][2] or '')
    if distance then
      local similarity = 1 - distance
      cosine[sub(found[i], skip)] = similarity > 1 and 1 or similarity < -1 and -1 or similarity
    end
  end
  query.by_graph = query.by_graph or by_graph
  return cosine
end

-- FT.SEARCH for the candidates with the words: id -> BM25 score
local function worded(query)
  local found = redis.pcall('FT.SEARCH', query.alias, query.worded, 'NOCONTENT', 'WITHSCORES', 'SCORER', 'BM25STD',
    'LIMIT', 0, query.candidates, 'TIMEOUT', search_timeout(query), 'DIALECT', 2)
  if found.err and not is_timeout(found.err) then return nil, found.err end
  if found.err then
    query.cut.words = true
    return {}, 0
  end
  local score, skip, sub, number = {}, query.skip, string.sub, tonumber
  for i = 2, #found, 2 do score[sub(found[i], skip)] = number(found[i + 1]) end
  return score, found[1]
end

-- the candidates of both lists, and how many have the words; nil and an error
local function looked(query)
  local cosine, bm25, with_words = {}, {}, 0
  if query.vector ~= '' then
    local err
    cosine, err = nearest(query)
    if not cosine then return nil, err end
    if left_ms(query) <= 0 then query.cut.index = true end
  end
  if query.worded ~= '' and query.mode ~= 'semantic' then
    if left_ms(query) <= 0 and next(cosine) ~= nil then
      query.cut.words = true
    else
      bm25, with_words = worded(query)
      if not bm25 then return nil, with_words end
      if left_ms(query) <= 0 then query.cut.words = true end
    end
  end
  return cosine, bm25, with_words
end

-- the same query, for the hot set and the session only; nil where there is neither
local function focused(query)
  local hot = redis.pcall('ZREVRANGE', query.hot, 0, HOT_FIRST - 1)
  local places = {}
  if #hot > 0 then places[1] = one_of(hot) end
  if query.session ~= '' then places[#places + 1] = '@session_id:{' .. query.session .. '}' end
  if #places == 0 then return nil end
  local place = '(' .. table.concat(places, '|') .. ')'
  return setmetatable({
    graph = false,
    topics = false,
    filter = query.filter == '*' and place or place .. ' ' .. query.filter,
    worded = query.worded ~= '' and '(' .. query.worded .. ') ' .. place or '',
  }, { __index = query, __newindex = query })
end

-- a search of the nearest topics pays where the whole index takes long and no graph shortens it
local function by_topics(query)
  if not query.centroids or query.topics or query.graph or not query.ids then return nil end
  if redis.call('ZCARD', query.ids) < LARGE then return nil end
  return setmetatable({ topics = NEAREST_TOPICS }, { __index = query, __newindex = query })
end

local function is_met(query, cosine)
  local good, best = 0, -1
  for _, similarity in pairs(cosine) do
    if similarity >= query.goal then good = good + 1 end
    if similarity > best then best = similarity end
  end
  return good >= query.min_results and best > query.excellent
end

-- the candidates by stages: the hot set and the session, the nearest topics, then the whole index, as far as time goes
local function by_stages(query)
  if not query.staged or query.vector == '' then return looked(query) end
  local stages, cosine, bm25, with_words = { focused(query) or false, by_topics(query) or false, query }, {}, {}, 0
  for i, stage in ipairs(stages) do
    if stage then
      local more, more_bm25, more_with_words = looked(stage)
      if not more then return nil, more_bm25 end
      for id, similarity in pairs(cosine) do more[id] = more[id] or similarity end
      -- scores of one look do not compare with those of another
      if not (query.cut.words and next(more_bm25) == nil) then bm25, with_words = more_bm25, more_with_words end
      cosine = more
      if i == #stages then break end
      query.early = query.min_results and is_met(query, cosine)
      if query.early then break end
      if left_ms(query) <= 0 then
        query.cut.index = true
        break
      end
    end
  end
  -- what the whole index was searched for as well was no restriction
  if not (query.topics or query.early or query.cut.index) then query.by_topics = nil end
  return cosine, bm25, with_words
end
