#!lua name=redismem_archive
-- Version: 2
-- Moves one owner's memories between Redis and the archive's files: out once a verified file holds them, and back.
--
-- Functions (KEYS -> ARGV -> reply); written: meta ids log turns searches hot hits graph0 graph1 archived
--   rm_aged_ro_v1        ids | prefix offset limit before -> found, (id quarter) …: of so many ids, oldest first, those
--                        of a quarter before number `before`; fewer found than limit ends the walk. Not pinned ones,
--                        and not what another hand gave a TTL: the archive would keep what must expire
--   rm_records_ro_v1     meta turns | prefix, ids … -> vector_field, (id prev_id prev_hash [field value …]) …
--   rm_archive_begin_v1  meta | lowest -> GONE | run, not below `lowest`: from here on no run before it changes anything
--   rm_archive_v1        written | prefix now_ms log_length run quarter, records …
--                        -> LOST | OK [a word a record]: ARCHIVED, MISSING, PINNED, CHANGED (it is not, field by field,
--                        what the file has) or, once a few have left a graph, WAITING: send it again
--   rm_restore_v1        written | prefix now_ms log_length run, records …
--                        -> NOINDEX | MOVED (the files of that run are not the newest) | OK [a word a record]:
--                        RESTORED, BARE (without its vector), GONE (deleted or back already), KEPT (there is a memory
--                        with this id again) or, as in rm_put, WAITING
--   rm_recount_v1        meta archived | quarter -> how many of it are archived; makes `archived` of meta say so
--   rm_archive_seen_v1   meta | generation state -> OK | STALE: keeps the state, if nothing was written meanwhile
--   A record is: id prev_id prev_hash vector_field count, (field value) …. prev is the turn before it, which its vector
--   was made from as well: a vector comes back only if that turn still is the one before and has that content.
--
-- Complexity: O(fields) a record plus its re-indexing; leaving a graph 1 ms, joining one 2 ms.
-- Storage: archived zset id -> quarter (4 * year + 0 to 3); meta hash, here: archived (quarters, blank between, sorted),
--   archive_run (number of the newest run: microseconds, or one more than the last), restored:<quarter> (epoch s),
--   archive_seen (the state in which there was nothing to do). The rest: lua/write.lua. Archived turns keep their places
--   in `turns`.
-- Derived keys: prefix .. id.
-- Limits: at most 500 records a call, 400 fields a record.

local FIELDS = 400
local RECORDS = 500
-- vectors that one call adds to or takes from a graph: each holds Redis for 1 or 2 ms
local GRAPH_ADDS = 4
local GRAPH_DROPS = 8
local VECTOR = { embedding = true, embedding_next = true, embedder = true, embedder_next = true }

-- part: check

-- check ---------------------------------------------------------------------------------------

-- the number of a quarter's name; nil for anything else
local function number_of(quarter)
  local year, part = string.match(quarter or '', '^(%d%d%d%d)%-Q([1-4])$')
  return year and 4 * year + part - 1
end

local function name_of(number)
  return string.format('%04d-Q%d', math.floor(number / 4), number % 4 + 1)
end

local function is_pinned(text)
  return text == '1' or text == 'True' or text == 'true'
end

local function parsed(args, at)
  local records = {}
  while at <= #args do
    local record = {
      id = args[at], prev_id = args[at + 1], prev_hash = args[at + 2], vector_field = args[at + 3],
      names = {}, values = {},
    }
    local count = whole(args[at + 4], 1, FIELDS)
    if not count or #args < at + 4 + 2 * count or #records == RECORDS then return nil end
    for i = at + 5, at + 4 + 2 * count, 2 do
      record.names[#record.names + 1] = args[i]
      record.values[args[i]] = args[i + 1]
    end
    records[#records + 1], at = record, at + 5 + 2 * count
  end
  return records
end

local function context_of(keys, args)
  local ctx = {
    meta = keys[1], ids = keys[2], log = keys[3], turns = keys[4], searches = keys[5], hot = keys[6], hits = keys[7],
    graph_keys = { keys[8], keys[9] }, archived = keys[10], adds = 0, drops = 0, prefix = args[1],
    now_ms = whole(args[2], 1, 1e14), log_length = whole(args[3], 1, 2 ^ 53), run = args[4],
  }
  return ctx.archived and ctx.now_ms and ctx.log_length and ctx.run and ctx or nil
end

local function wrong_types(ctx)
  return wrong_type(ctx.meta, 'hash') or wrong_type(ctx.ids, 'zset') or wrong_type(ctx.log, 'stream')
    or wrong_type(ctx.turns, 'hash') or wrong_type(ctx.hot, 'zset') or wrong_type(ctx.hits, 'hash')
    or wrong_type(ctx.archived, 'zset')
end

-- read ----------------------------------------------------------------------------------------

local function preceding(turns, id)
  local link = redis.call('HGET', turns, 'l' .. id)
  return link and string.match(link, '^[^\31]*') or ''
end

-- whether the hash is, field by field, the record
local function is_same(key, record)
  if redis.call('TYPE', key).ok ~= 'hash' or redis.call('HLEN', key) ~= #record.names then return false end
  local stored = redis.call('HMGET', key, unpack(record.names))
  for i, name in ipairs(record.names) do
    if stored[i] ~= record.values[name] then return false end
  end
  return true
end

-- the record's vector, when it is one of the owner's index and of what is stored now
local function vector_of(ctx, record)
  local vector = record.values[record.vector_field]
  if not vector or record.values.embedder ~= ctx.embedder or #vector ~= 2 * ctx.dim then return nil end
  local before = preceding(ctx.turns, record.id)
  if before ~= record.prev_id then return nil end
  if before == '' then return vector end
  local hash = redis.call('HGET', ctx.prefix .. before, 'content_hash')
  return hash and hash ~= '' and hash == record.prev_hash and vector or nil
end

local function aged(keys, args)
  local prefix, offset, limit = args[1], whole(args[2], 0, 1e9), whole(args[3], 1, 1000)
  local limit_number = whole(args[4], 0, 40000)
  if not (keys[1] and offset and limit and limit_number) then
    return misuse('rm_aged_ro ids | prefix offset limit before')
  end
  local ids = redis.call('ZRANGE', keys[1], offset, offset + limit - 1)
  local reply = { #ids }
  for _, id in ipairs(ids) do
    local raw = redis.pcall('HMGET', prefix .. id, 'partition', 'pinned')
    local number = raw[1] and number_of(raw[1])
    if number and number < limit_number and not is_pinned(raw[2]) and redis.call('PTTL', prefix .. id) == -1 then
      reply[#reply + 1], reply[#reply + 2] = id, raw[1]
    end
  end
  return reply
end

local function read_records(keys, args)
  local meta, turns, prefix = keys[1], keys[2], args[1]
  if not (turns and prefix and #args <= RECORDS + 1) then return misuse('rm_records_ro meta turns | prefix, ids') end
  local reply = { redis.call('HGET', meta, 'vector_field') or 'embedding' }
  for i = 2, #args do
    local raw = redis.pcall('HGETALL', prefix .. args[i])
    if not raw.err and #raw > 0 and #raw <= 2 * FIELDS then
      local before = preceding(turns, args[i])
      local hash = before ~= '' and redis.pcall('HGET', prefix .. before, 'content_hash')
      for _, item in ipairs({ args[i], before, type(hash) == 'string' and hash or '', raw }) do
        reply[#reply + 1] = item
      end
    end
  end
  return reply
end

-- write: nothing below may raise ----------------------------------------------------------------

-- part: floats
-- part: graphs

local function bump(ctx)
  return redis.call('HINCRBY', ctx.meta, 'generation', 1)
end

local function log(ctx, event, id, version)
  redis.call('XADD', ctx.log, 'MAXLEN', '~', ctx.log_length, '*', 'id', id, 'event', event,
    'version', version, 'at_ms', string.format('%.0f', ctx.now_ms), 'other', '')
end

-- a stored time as the index and the zset take it; 0 when another hand wrote something else
local function moment(text)
  local number = tonumber(text or '')
  return number and number > -1e12 and number < 1e12 and string.format('%.6f', number) or '0'
end

-- make `archived` of meta name the quarter exactly when some of it are archived; return how many
local function recounted(meta, archived, number)
  local count, quarter = redis.call('ZCOUNT', archived, number, number), name_of(number)
  local words = {}
  for word in string.gmatch(redis.call('HGET', meta, 'archived') or '', '%S+') do
    if word ~= quarter then words[#words + 1] = word end
  end
  if count > 0 then words[#words + 1] = quarter end
  table.sort(words)
  if #words > 0 then
    redis.call('HSET', meta, 'archived', table.concat(words, ' '))
  else
    redis.call('HDEL', meta, 'archived')
  end
  return count
end

local function take_out(ctx, record, number)
  local key = ctx.prefix .. record.id
  if redis.call('EXISTS', key) == 0 then return 'MISSING' end
  if is_pinned(record.values.pinned) then return 'PINNED' end
  if not is_same(key, record) then return 'CHANGED' end
  redis.call('DEL', key)
  -- an index keeps counting it: see rm_refresh_begin in lua/maintain.lua
  redis.call('HINCRBY', ctx.meta, 'reindexed', 1)
  if #graphs(ctx) > 0 then
    drop_from_graphs(ctx, record.id)
    ctx.drops = ctx.drops + 1
  end
  redis.call('ZREM', ctx.ids, record.id)
  redis.call('ZREM', ctx.hot, record.id)
  redis.call('HDEL', ctx.hits, record.id)
  redis.call('ZADD', ctx.archived, number, record.id)
  log(ctx, 'archived', record.id, bump(ctx))
  return 'ARCHIVED'
end

local function put_back(ctx, record)
  local key, values, flat = ctx.prefix .. record.id, record.values, {}
  local number = redis.call('ZSCORE', ctx.archived, record.id)
  if not number then return 'GONE' end
  redis.call('ZREM', ctx.archived, record.id)
  ctx.quarters[number] = true
  if redis.call('EXISTS', key) == 1 then return 'KEPT' end
  local version, vector = bump(ctx), vector_of(ctx, record)
  local function set(name, value)
    flat[#flat + 1], flat[#flat + 2] = name, value
  end
  for _, name in ipairs(record.names) do
    if not VECTOR[name] and name ~= 'version' then set(name, values[name]) end
  end
  set('version', version)
  if vector then
    set(ctx.vector_field, vector)
    set('embedder', ctx.embedder)
  end
  redis.call('HSET', key, unpack(flat))
  redis.call('ZADD', ctx.ids, moment(values.created_at), record.id)
  if values.superseded_by then
    redis.call('HSET', ctx.meta, 'superseded', 1)
  elseif vector then
    add_to_graphs(ctx, record.id, vector)
  end
  log(ctx, 'restored', record.id, version)
  return vector and 'RESTORED' or 'BARE'
end

-- functions -----------------------------------------------------------------------------------

local function begin(keys, args)
  local meta, lowest = keys[1], whole(args[1], 1, 2 ^ 53)
  if not (meta and lowest) then return misuse('rm_archive_begin meta | lowest') end
  local wrong = wrong_type(meta, 'hash')
  if wrong then return wrong end
  if redis.call('HEXISTS', meta, 'generation') == 0 then return 'GONE' end
  local last = tonumber(redis.call('HGET', meta, 'archive_run') or '') or 0
  local run = string.format('%.0f', math.max(lowest, last + 1))
  redis.call('HSET', meta, 'archive_run', run)
  return run
end

local function archive(keys, args)
  local ctx, number, records = context_of(keys, args), number_of(args[5]), parsed(args, 6)
  if not (ctx and number and records) then return misuse('rm_archive … | prefix now_ms log_length run quarter, …') end
  local wrong = wrong_types(ctx)
  if wrong then return wrong end
  if redis.call('HGET', ctx.meta, 'archive_run') ~= ctx.run then return { 'LOST' } end

  local words, is_changed = {}, false
  for i, record in ipairs(records) do
    words[i] = ctx.drops < GRAPH_DROPS and take_out(ctx, record, number) or 'WAITING'
    is_changed = is_changed or words[i] == 'ARCHIVED'
  end
  if is_changed then
    redis.call('UNLINK', ctx.searches)
    redis.call('HDEL', ctx.meta, 'restored:' .. args[5])
    recounted(ctx.meta, ctx.archived, number)
  end
  return { 'OK', words }
end

local function restore(keys, args)
  local ctx, records = context_of(keys, args), parsed(args, 5)
  if not (ctx and records) then return misuse('rm_restore … | prefix now_ms log_length run, …') end
  local wrong = wrong_types(ctx)
  if wrong then return wrong end
  local raw = redis.call('HMGET', ctx.meta, 'index', 'index_state', 'archive_run', 'embedder', 'dim', 'vector_field')
  if (raw[3] or '') ~= ctx.run then return { 'MOVED' } end
  if not raw[1] or raw[2] == 'cold' then return { 'NOINDEX' } end
  ctx.embedder, ctx.dim, ctx.vector_field, ctx.quarters = raw[4], tonumber(raw[5] or '') or 0, raw[6] or 'embedding', {}

  local words = {}
  for i, record in ipairs(records) do
    words[i] = ctx.adds < GRAPH_ADDS and put_back(ctx, record) or 'WAITING'
  end
  if next(ctx.quarters) then
    local now_s = string.format('%.3f', ctx.now_ms / 1000)
    redis.call('UNLINK', ctx.searches)
    redis.call('HSET', ctx.meta, 'last_activity', now_s)
    for number in pairs(ctx.quarters) do
      recounted(ctx.meta, ctx.archived, tonumber(number))
      redis.call('HSET', ctx.meta, 'restored:' .. name_of(tonumber(number)), now_s)
    end
  end
  return { 'OK', words }
end

local function recount(keys, args)
  local meta, archived, number = keys[1], keys[2], number_of(args[1])
  if not (archived and number) then return misuse('rm_recount meta archived | quarter') end
  local wrong = wrong_type(meta, 'hash') or wrong_type(archived, 'zset')
  if wrong then return wrong end
  -- a forgotten owner must not get a meta hash again
  return redis.call('EXISTS', meta) == 1 and recounted(meta, archived, number) or 0
end

local function seen(keys, args)
  if not (keys[1] and args[2]) then return misuse('rm_archive_seen meta | generation state') end
  if redis.call('HGET', keys[1], 'generation') ~= args[1] then return 'STALE' end
  redis.call('HSET', keys[1], 'archive_seen', args[2])
  return 'OK'
end

redis.register_function { function_name = 'rm_aged_ro_v1', callback = aged, flags = { 'no-writes' } }
redis.register_function { function_name = 'rm_records_ro_v1', callback = read_records, flags = { 'no-writes' } }
redis.register_function('rm_archive_begin_v1', begin)
redis.register_function('rm_archive_v1', archive)
redis.register_function('rm_restore_v1', restore)
redis.register_function('rm_recount_v1', recount)
redis.register_function('rm_archive_seen_v1', seen)
