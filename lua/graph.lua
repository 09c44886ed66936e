#!lua name=redismem_graph
-- Version: 1
-- Builds and removes the HNSW graph of a large owner, beside the exact index, which goes on serving.
--
-- A graph is a vector set (Redis 8): id -> vector in 8 bits, of each memory that has a vector and is not superseded.
-- Unlike an HNSW index of RediSearch it is stored as a graph, so a restart does not build it again. Every Function
-- that changes a vector changes the graphs in the same step (lua/parts/graphs.lua), also the one that is being
-- built; so what serves is never behind, and what is built misses only what the walk has not reached.
--
-- Functions (KEYS -> ARGV -> reply)
--   rm_graph_begin_v1   meta graph0 graph1 | profile links width ef restart(0/1)
--                       -> GONE | BUSY (its index is not complete) | UNSUPPORTED (no vector sets) |
--                       STARTED or RESUMED: a graph of these parameters is being built
--   rm_graph_grow_v1    meta graph0 graph1 | prefix, ids …  -> GONE | OK done: the first so many ids are in it, or
--                       do not belong in it; go on after them
--   rm_graph_switch_v1  alias meta graph0 graph1 -> GONE | SHORT have want | OK: searches use it from here on
--   rm_graph_drop_v1    meta graph0 graph1       -> OK: searches are exact, the graphs are gone
--
-- Complexity: O(log n) a vector, 2 ms at 384 dimensions; the others O(1) and one count of the index.
-- Storage: graph vector set; meta hash, here: graph, graph_next (number profile links width ef; the one that serves,
--   the one that is built), graph_writes (vectors added since the count was last taken down), algorithm.
-- Derived keys: prefix .. id. Limits: GRAPH_ADDS vectors a call.

local GRAPH_ADDS = 4

-- part: check
-- part: floats
-- part: graphs

local function begin(keys, args)
  local meta, profile, links, width = keys[1], args[1], whole(args[2], 4, 512), whole(args[3], 4, 4096)
  local ef = whole(args[4], 1, 100000)
  if not (keys[3] and profile and not string.find(profile, '%s') and links and width and ef and args[5]) then
    return misuse('rm_graph_begin meta graph0 graph1 | profile links width ef restart')
  end
  local raw = redis.call('HMGET', meta, 'index', 'index_state', 'graph', 'graph_next')
  if not raw[1] then return 'GONE' end
  if raw[2] then return 'BUSY' end
  local probed = redis.pcall('VISMEMBER', keys[2], '')
  if type(probed) == 'table' and string.find(string.lower(probed.err), 'unknown') then return 'UNSUPPORTED' end
  local number = string.sub(raw[3] or '', 1, 1) == '0' and '1' or '0'
  local wanted = table.concat({ number, profile, links, width, ef }, ' ')
  if raw[4] == wanted and args[5] == '0' then return 'RESUMED' end
  redis.call('UNLINK', keys[2 + number])
  redis.call('HSET', meta, 'graph_next', wanted)
  return 'STARTED'
end

local function grow(keys, args)
  local ctx = { meta = keys[1], graph_keys = { keys[2], keys[3] }, adds = 0 }
  local prefix = args[1]
  if not (keys[3] and prefix) then return misuse('rm_graph_grow meta graph0 graph1 | prefix, ids') end
  local raw = redis.call('HMGET', ctx.meta, 'graph_next', 'vector_field', 'embedder')
  local number = string.match(raw[1] or '', '^([01]) ')
  if not number then return 'GONE' end
  local key, done = ctx.graph_keys[number + 1], 0
  -- the graph that serves has them
  for _, graph in ipairs(graphs(ctx)) do
    if graph.key == key then ctx.graphs = { graph } end
  end
  while done < #args - 1 and ctx.adds < GRAPH_ADDS do
    local id = args[done + 2]
    local record = redis.pcall('HMGET', prefix .. id, raw[2] or 'embedding', 'embedder', 'superseded_by')
    if record[1] and record[2] == raw[3] and not record[3] and redis.call('VISMEMBER', key, id) == 0 then
      add_to_graphs(ctx, id, record[1])
    end
    done = done + 1
  end
  return { 'OK', done }
end

local function switch(keys)
  local alias, meta = keys[1], keys[2]
  if not keys[4] then return misuse('rm_graph_switch alias meta graph0 graph1') end
  local raw = redis.call('HMGET', meta, 'graph', 'graph_next', 'index_state')
  local number = string.match(raw[2] or '', '^([01]) ')
  if not number or raw[3] then return { 'GONE' } end
  local counted = redis.pcall('FT.SEARCH', alias, '-ismissing(@embedding) ismissing(@superseded_by)',
    'LIMIT', 0, 0, 'DIALECT', 2)
  if counted.err then return { 'GONE' } end
  local have = redis.call('VCARD', keys[3 + number])
  if have < counted[1] then return { 'SHORT', have, counted[1] } end
  redis.call('HSET', meta, 'graph', raw[2], 'algorithm', 'HNSW')
  redis.call('HDEL', meta, 'graph_next')
  redis.call('UNLINK', keys[4 - number])
  return { 'OK' }
end

local function drop(keys)
  if not keys[3] then return misuse('rm_graph_drop meta graph0 graph1') end
  redis.call('HDEL', keys[1], 'graph', 'graph_next', 'graph_writes')
  if redis.call('HEXISTS', keys[1], 'index') == 1 then redis.call('HSET', keys[1], 'algorithm', 'FLAT') end
  redis.call('UNLINK', keys[2], keys[3])
  return 'OK'
end

redis.register_function('rm_graph_begin_v1', begin)
redis.register_function('rm_graph_grow_v1', grow)
redis.register_function('rm_graph_switch_v1', switch)
redis.register_function('rm_graph_drop_v1', drop)
