-- Part of several libraries (`-- part: graphs`): keeps the HNSW graphs of a large owner in step with its vectors.
-- ctx holds meta, graph_keys (the two keys; none from a caller of an older version) and adds (a count). What the
-- graphs are is told in lua/graph.lua. Nothing here raises.

-- the graphs of a large owner. One that a call cannot change goes, and searches are exact until it is built anew
local function graphs(ctx)
  if ctx.graphs then return ctx.graphs end
  ctx.graphs = {}
  for _, name in ipairs({ 'graph', 'graph_next' }) do
    local raw = redis.call('HGET', ctx.meta, name)
    local number, links, width = string.match(raw or '', '^([01]) %S+ (%d+) (%d+)')
    local key = number and ctx.graph_keys[number + 1]
    if key then
      table.insert(ctx.graphs, { name = name, key = key, links = links, width = width })
    elseif raw then
      redis.call('HDEL', ctx.meta, name)
      redis.call('HSET', ctx.meta, 'algorithm', 'FLAT')
    end
  end
  return ctx.graphs
end

local function add_to_graphs(ctx, id, vector)
  for _, graph in ipairs(graphs(ctx)) do
    local added = redis.pcall('VADD', graph.key, 'FP32', float32(vector), id, 'Q8', 'EF', graph.width, 'M', graph.links)
    if type(added) == 'table' then redis.call('HDEL', ctx.meta, graph.name) end
    redis.call('HINCRBY', ctx.meta, 'graph_writes', 1)
    ctx.adds = ctx.adds + 1
  end
end

local function drop_from_graphs(ctx, id)
  for _, graph in ipairs(graphs(ctx)) do
    if type(redis.pcall('VREM', graph.key, id)) == 'table' then redis.call('HDEL', ctx.meta, graph.name) end
  end
end
