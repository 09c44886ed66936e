-- Part of several libraries (`-- part: shown`): what is derived is shown as long as its sources are as they were read.
-- Needs `-- part: derived`. Nothing here raises or writes.

local function is_true(prefix, sources, digests)
  local at = 0
  local known = {}
  for digest in string.gmatch(digests or '', '%S+') do known[#known + 1] = digest end
  for _, id in ipairs(decoded(sources)) do
    at = at + 1
    local digest = type(id) == 'string' and digest_of(prefix, id)
    if not digest or digest ~= known[at] then return false end
  end
  return true
end

local function fields_of(key)
  local flat = redis.pcall('HGETALL', key)
  local values = {}
  for i = 1, flat.err and 0 or #flat, 2 do values[flat[i]] = flat[i + 1] end
  return values
end

local function flat_of(values, kept)
  local flat = {}
  for name, value in pairs(values) do
    if not kept or kept[name] then flat[#flat + 1], flat[#flat + 2] = name, value end
  end
  return flat
end

-- words of a topic that a memory is still known to have, best first, and for each such a memory
local function label_words(prefix, key)
  local raw, shown, witnesses = redis.pcall('HMGET', key, 'words', 'digests'), {}, {}
  local digests = decoded(raw[2])
  for _, entry in ipairs(decoded(raw[1])) do
    local word, ids = unpack(type(entry) == 'table' and entry or {})
    for _, id in ipairs(type(word) == 'string' and type(ids) == 'table' and ids or {}) do
      local digest = type(id) == 'string' and digest_of(prefix, id)
      if digest and digest == digests[id] then
        shown[#shown + 1], witnesses[#witnesses + 1] = word, id
        break
      end
    end
  end
  return shown, witnesses
end
