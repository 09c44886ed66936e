#!lua name=redismem_jobs
-- Version: 1
-- Moves jobs: from waiting to the stream that workers read, out of it when done, back or to the dead letters when not.
--
-- Functions (KEYS -> ARGV -> reply); a job is "<owner tag> <kind>". At most one of a name waits, and one is in the stream
--   rm_jobs_start_v1  jobs later live rest | now_ms limit -> how many started: those that are due, unless the same job
--                     is in the stream or rests
--   rm_job_done_v1    jobs later live rest tries dead | group entry job now_ms rest_ms -> OK
--   rm_job_failed_v1  jobs later live tries dead | group entry job now_ms due_ms most error -> RETRY n | DEAD n
--   rm_jobs_queue_v1  later | due_ms, jobs … -> OK; one that waits starts at the earlier moment
--   rm_jobs_retry_v1  dead later tries | now_ms, jobs … -> how many dead letters wait again
--   rm_schedule_v1    store later | name slot due_ms job -> OK | DONE: queues it once a slot (a growing number)
--
-- Complexity: O(jobs).
-- Storage: jobs stream of {job}; later zset job -> ms from which it may start; live hash job -> its entry; rest zset job
--   -> ms until which it may not start again; tries hash job -> how often it failed, blank, the last error; dead hash job
--   -> JSON {tries, error, at_ms}; store hash, here: schedule:<name> (the last slot).
-- Derived keys: none.
-- Limits: none of these is bounded, but each has a job a user and kind at most.

-- part: check

local function wrong_jobs(jobs, later, live)
  return wrong_type(jobs, 'stream') or wrong_type(later, 'zset') or wrong_type(live, 'hash')
end

local function is_live(jobs, live, job)
  local entry = redis.call('HGET', live, job)
  -- a stream that another hand removed must not hold up its jobs for ever
  return entry and #redis.call('XRANGE', jobs, entry, entry) > 0
end

-- jobs whose entries another hand removed with the stream wait again
local function restore_lost(jobs, later, live, now_ms)
  if redis.call('HLEN', live) <= redis.call('XLEN', jobs) then return end
  for _, job in ipairs(redis.call('HKEYS', live)) do
    if not is_live(jobs, live, job) then
      redis.call('HDEL', live, job)
      redis.call('ZADD', later, 'LT', now_ms, job)
    end
  end
end

local function start(keys, args)
  local jobs, later, live, rest = keys[1], keys[2], keys[3], keys[4]
  local now_ms, limit = whole(args[1], 1, 1e14), whole(args[2], 1, 1000)
  if not (rest and now_ms and limit) then return misuse('rm_jobs_start jobs later live rest | now_ms limit') end
  local wrong = wrong_jobs(jobs, later, live) or wrong_type(rest, 'zset')
  if wrong then return wrong end
  local started = 0
  restore_lost(jobs, later, live, now_ms)
  redis.call('ZREMRANGEBYSCORE', rest, '-inf', now_ms)
  for _, job in ipairs(redis.call('ZRANGEBYSCORE', later, '-inf', now_ms, 'LIMIT', 0, limit)) do
    local rests_until = redis.call('ZSCORE', rest, job)
    if rests_until then
      redis.call('ZADD', later, rests_until, job)
    elseif is_live(jobs, live, job) then
      redis.call('ZADD', later, now_ms + 1000, job)
    else
      redis.call('ZREM', later, job)
      redis.call('HSET', live, job, redis.call('XADD', jobs, '*', 'job', job))
      started = started + 1
    end
  end
  return started
end

local function leave(jobs, live, group, entry, job)
  redis.pcall('XACK', jobs, group, entry)
  redis.call('XDEL', jobs, entry)
  if redis.call('HGET', live, job) == entry then redis.call('HDEL', live, job) end
end

local function done(keys, args)
  local jobs, later, live, rest, tries, dead = unpack(keys)
  local group, entry, job, now_ms, rest_ms = args[1], args[2], args[3], whole(args[4], 1, 1e14), whole(args[5], 0, 1e12)
  if not (dead and now_ms and rest_ms) then return misuse('rm_job_done jobs later live rest tries dead | …') end
  local wrong = wrong_jobs(jobs, later, live) or wrong_type(rest, 'zset')
  if wrong then return wrong end
  leave(jobs, live, group, entry, job)
  if rest_ms > 0 then redis.call('ZADD', rest, now_ms + rest_ms, job) end
  redis.call('HDEL', tries, job)
  redis.call('HDEL', dead, job)
  return 'OK'
end

local function failed(keys, args)
  local jobs, later, live, tries, dead = unpack(keys)
  local group, entry, job, now_ms, due_ms = args[1], args[2], args[3], whole(args[4], 1, 1e14), whole(args[5], 1, 1e14)
  local most, err = whole(args[6], 1, 1000), args[7]
  if not (dead and due_ms and most and err) then return misuse('rm_job_failed jobs later live tries dead | …') end
  local wrong = wrong_jobs(jobs, later, live)
  if wrong then return wrong end
  leave(jobs, live, group, entry, job)
  local count = (tonumber(string.match(redis.call('HGET', tries, job) or '', '^%d+')) or 0) + 1
  if count < most then
    redis.call('HSET', tries, job, count .. ' ' .. err)
    redis.call('ZADD', later, 'LT', due_ms, job)
    return { 'RETRY', count }
  end
  redis.call('HDEL', tries, job)
  redis.call('HSET', dead, job, cjson.encode({ tries = count, error = err, at_ms = now_ms }))
  return { 'DEAD', count }
end

local function queue(keys, args)
  if not (keys[1] and whole(args[1], 1, 1e14)) then return misuse('rm_jobs_queue later | due_ms, jobs') end
  local wrong = wrong_type(keys[1], 'zset')
  if wrong then return wrong end
  for i = 2, #args do redis.call('ZADD', keys[1], 'LT', args[1], args[i]) end
  return 'OK'
end

local function retry(keys, args)
  if not (keys[3] and whole(args[1], 1, 1e14)) then return misuse('rm_jobs_retry dead later tries | now_ms, jobs') end
  local count = 0
  for i = 2, #args do
    if redis.call('HDEL', keys[1], args[i]) == 1 then
      redis.call('HDEL', keys[3], args[i])
      redis.call('ZADD', keys[2], 'LT', args[1], args[i])
      count = count + 1
    end
  end
  return count
end

local function schedule(keys, args)
  local store, later, name, slot = keys[1], keys[2], args[1], whole(args[2], 0, 1e14)
  if not (later and slot and whole(args[3], 1, 1e14) and args[4]) then return misuse('rm_schedule store later | …') end
  local last = tonumber(redis.call('HGET', store, 'schedule:' .. name) or '') or -1
  if slot <= last then return 'DONE' end
  redis.call('HSET', store, 'schedule:' .. name, args[2])
  redis.call('ZADD', later, 'LT', args[3], args[4])
  return 'OK'
end

redis.register_function('rm_jobs_start_v1', start)
redis.register_function('rm_job_done_v1', done)
redis.register_function('rm_job_failed_v1', failed)
redis.register_function('rm_jobs_queue_v1', queue)
redis.register_function('rm_jobs_retry_v1', retry)
redis.register_function('rm_schedule_v1', schedule)
