#!lua name=redismem_cache
-- Version: 4
-- Counts which of one owner's memories are used, and keeps the hot ones: the hot set, and nothing else.
--
-- Functions (KEYS -> ARGV -> reply)
--   rm_touch_v1  hot hits [meta used] | prefix now_ms ttl_ms capacity, (id count) …
--                -> OK touched evicted: adds count to the accesses of each memory that still exists, and sets
--                its last access, and last_read in meta, to now_ms, the access in used for good; then evicts
--                every id that was not used for longer than ttl_ms and, until capacity remain, the lowest access_count / max(1, seconds since the last access),
--                the lower id first of equals
--
-- Complexity: O(ids); O(hot set) when it is over capacity (1 ms at 1,000). Exact, where Redis's own LFU
--   samples: the set is small and the order is promised.
-- Storage: hot zset id -> last access in ms; hits hash id -> accesses. Both hold the same ids; ones that
--   do not, after a foreign hand, start anew. Both expire ttl_ms after the last touch.
-- Derived keys: prefix .. id.
-- Limits: at most 1,000 ids a call.

local UNPACK = 1000

-- part: check

-- check ---------------------------------------------------------------------------------------

-- ids in the order given, and how often each was used; nil when an argument is not what it must be
local function uses_of(args)
  if #args % 2 == 1 or #args > 4 + 2 * 1000 then return nil end
  local ids, uses = {}, {}
  for i = 5, #args, 2 do
    local id, count = args[i], whole(args[i + 1], 1, 2 ^ 53)
    if not count then return nil end
    if not uses[id] then ids[#ids + 1] = id end
    uses[id] = (uses[id] or 0) + count
  end
  return ids, uses
end

-- read ----------------------------------------------------------------------------------------

-- a touch that arrives after a delete must not bring the id back
local function existing(prefix, ids)
  local there, keys = {}, {}
  for i, id in ipairs(ids) do keys[i] = prefix .. id end
  if #keys > 0 and redis.call('EXISTS', unpack(keys)) == #keys then return ids end
  for _, id in ipairs(ids) do
    if redis.call('EXISTS', prefix .. id) == 1 then there[#there + 1] = id end
  end
  return there
end

-- the `count` entries that go first, in a heap whose top goes last of them: O(n) when count is small
local function lowest(entries, count)
  local heap = {}
  local function later(a, b)
    return a.worth > b.worth or a.worth == b.worth and a.id > b.id
  end
  local function sink(at)
    while true do
      local top, left = at, 2 * at
      if left <= #heap and later(heap[left], heap[top]) then top = left end
      if left < #heap and later(heap[left + 1], heap[top]) then top = left + 1 end
      if top == at then return end
      heap[at], heap[top], at = heap[top], heap[at], top
    end
  end
  for i = 1, count do heap[i] = entries[i] end
  for at = math.floor(count / 2), 1, -1 do sink(at) end
  for i = count + 1, #entries do
    if later(heap[1], entries[i]) then
      heap[1] = entries[i]
      sink(1)
    end
  end
  return heap
end

-- the ids beyond the capacity
local function surplus(hot, hits, now_ms, capacity)
  local count = redis.call('ZCARD', hot) - capacity
  if count <= 0 then return {} end
  local accesses, entries, victims = {}, {}, {}
  local flat = redis.call('HGETALL', hits)
  for i = 1, #flat, 2 do accesses[flat[i]] = tonumber(flat[i + 1]) end
  flat = redis.call('ZRANGE', hot, 0, -1, 'WITHSCORES')
  for i = 1, #flat, 2 do
    local age_s = (now_ms - flat[i + 1]) / 1000
    entries[#entries + 1] = { id = flat[i], worth = (accesses[flat[i]] or 0) / (age_s > 1 and age_s or 1) }
  end
  for i, entry in ipairs(lowest(entries, count)) do victims[i] = entry.id end
  return victims
end

-- write: nothing below may raise ----------------------------------------------------------------

local function add(hot, hits, used, now_ms, ids, uses)
  local now, now_s = string.format('%.0f', now_ms), string.format('%.3f', now_ms / 1000)
  for first = 1, #ids, UNPACK / 2 do
    local part = { unpack(ids, first, math.min(first + UNPACK / 2 - 1, #ids)) }
    local moments, counts, times = {}, {}, {}
    for i, raw in ipairs(redis.call('HMGET', hits, unpack(part))) do
      moments[2 * i - 1], moments[2 * i] = now, part[i]
      times[2 * i - 1], times[2 * i] = now_s, part[i]
      counts[2 * i - 1], counts[2 * i] = part[i], string.format('%.0f', (tonumber(raw or '') or 0) + uses[part[i]])
    end
    redis.call('ZADD', hot, unpack(moments))
    redis.call('HSET', hits, unpack(counts))
    if used then redis.call('ZADD', used, unpack(times)) end
  end
end

local function remove(hot, hits, ids)
  for first = 1, #ids, UNPACK do
    local last = math.min(first + UNPACK - 1, #ids)
    redis.call('ZREM', hot, unpack(ids, first, last))
    redis.call('HDEL', hits, unpack(ids, first, last))
  end
end

local function touch(keys, args)
  local hot, hits, meta, used, prefix = keys[1], keys[2], keys[3], keys[4], args[1]
  local now_ms, ttl_ms = whole(args[2], 1, 1e14), whole(args[3], 1, 1e13)
  local capacity, ids, uses = whole(args[4], 1, 1e6), uses_of(args)
  if not (hits and now_ms and ttl_ms and capacity and ids) then
    return misuse('rm_touch hot hits | prefix now_ms ttl_ms capacity, at most 1,000 of (id count)')
  end
  local wrong = wrong_type(hot, 'zset') or wrong_type(hits, 'hash') or meta and wrong_type(meta, 'hash')
    or used and wrong_type(used, 'zset')
  if wrong then return wrong end
  ids = existing(prefix, ids)

  if redis.call('ZCARD', hot) ~= redis.call('HLEN', hits) then redis.call('DEL', hot, hits) end
  add(hot, hits, used, now_ms, ids, uses)
  local cold = redis.call('ZRANGEBYSCORE', hot, '-inf', string.format('(%.0f', now_ms - ttl_ms))
  remove(hot, hits, cold)
  local victims = surplus(hot, hits, now_ms, capacity)
  remove(hot, hits, victims)
  if meta and redis.call('EXISTS', meta) == 1 then
    redis.call('HSET', meta, 'last_read', string.format('%.3f', now_ms / 1000))
  end
  redis.call('PEXPIRE', hot, string.format('%.0f', ttl_ms))
  redis.call('PEXPIRE', hits, string.format('%.0f', ttl_ms))
  return { 'OK', #ids, #cold + #victims }
end

redis.register_function('rm_touch_v1', touch)
