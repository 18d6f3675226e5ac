#!lua name=millrace_slates_VERSION
-- A user's last slate: the source (8 bytes) and last offset (i64, little endian) that it covers, then the JSON.
-- One GET reads it: the JSON starts at byte 16.

local STAMP = '<c8i8'
local STAMP_BYTES = 16

-- KEYS: the slate.  ARGS: source, last offset, JSON, ttl_s.
-- Returns 1, or 0 when the stored slate has the same source and covers later offsets.
local function put(keys, args)
  local stamp = redis.pcall('GETRANGE', keys[1], 0, STAMP_BYTES - 1) -- a table when the key is of another type
  local offset = tonumber(args[2])
  if type(stamp) == 'string' and #stamp == STAMP_BYTES then
    local source, stored_offset = struct.unpack(STAMP, stamp)
    if source == args[1] and stored_offset > offset then
      return 0
    end
  end
  redis.call('SET', keys[1], struct.pack(STAMP, args[1], offset) .. args[3], 'EX', args[4])
  return 1
end

redis.register_function('millrace_slate_VERSION', put)
