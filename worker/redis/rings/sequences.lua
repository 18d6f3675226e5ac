#!lua name=millrace_sequences_VERSION
-- A user's ring: 40 bytes of header, then events of 24 bytes; event j (of all ever appended) is in slot j % cap.
--
--   0  u8   format (1)                 8  8 bytes  source of the latest push, 0 = none
--   1  u8   event_bytes (24)          16  i64      its last offset
--   2  u16  cap                       24  8 bytes  the other source
--   4  u32  count, ever appended      32  i64      its last offset
--
-- All little endian. A ring that is not full is only as long as its events.

local FORMAT, EVENT_BYTES, HEADER_BYTES = 1, 24, 40
local HEADER = '<BBI2I4c8i8c8i8'
local ENTRY_BYTES = 8 + EVENT_BYTES -- in the arguments: an offset i64, then the event
local NO_SOURCE = '\0\0\0\0\0\0\0\0'
local MAX_COUNT = 2147483648 -- the count is reduced by whole rings before it outgrows its 32 bits

local function read_header(key, bytes)
  if #bytes == 0 then
    return { count = 0, source = NO_SOURCE, last_offset = 0, other_source = NO_SOURCE, other_last_offset = 0 }
  end
  local format, event_bytes = string.byte(bytes, 1, 2)
  if #bytes < HEADER_BYTES or format ~= FORMAT or event_bytes ~= EVENT_BYTES or string.sub(bytes, 3, 4) == '\0\0' then
    error({ err = 'MILLRACEFORMAT ' .. key .. ' is not a ring that this version can read (format ' ..
      tostring(format) .. ', ' .. tostring(event_bytes) .. ' bytes per event)' })
  end
  local _, _, cap, count, source, last_offset, other_source, other_last_offset = struct.unpack(HEADER, bytes)
  return {
    cap = cap,
    count = count,
    source = source,
    last_offset = last_offset,
    other_source = other_source,
    other_last_offset = other_last_offset,
  }
end

-- Return the last offset of `source`, -1 for a new one.
local function get_last_offset(header, source)
  if header.source == source then
    return header.last_offset
  end
  return header.other_source == source and header.other_last_offset or -1
end

-- Move `source` to the front of the two; a new one replaces the one that was used less recently.
local function use_source(header, source)
  if header.source == source then
    return
  end
  local last_offset = get_last_offset(header, source)
  header.other_source, header.other_last_offset = header.source, header.last_offset
  header.source, header.last_offset = source, last_offset
end

-- Return the events after `last_offset`, and the last offset including them.
local function select_new_events(entries, last_offset)
  local events = {}
  for at = 1, #entries, ENTRY_BYTES do
    local offset = struct.unpack('<i8', entries, at)
    if offset > last_offset then
      events[#events + 1] = string.sub(entries, at + 8, at + ENTRY_BYTES - 1)
      last_offset = offset
    end
  end
  return events, last_offset
end

-- Rewrite the ring for another cap, keeping the newest events.
local function migrate(key, header, cap)
  local events = string.sub(redis.call('GET', key), HEADER_BYTES + 1)
  local length = math.min(header.count, header.cap)
  local first = (header.count - length) % header.cap * EVENT_BYTES
  events = string.sub(events, first + 1) .. string.sub(events, 1, first) -- oldest first
  if length > cap then
    events, length = string.sub(events, (length - cap) * EVENT_BYTES + 1), cap
  end
  header.cap = cap
  if length < cap then
    header.count = length -- events that a smaller ring has dropped stay lost
  end
  local start = (header.count - length) % cap * EVENT_BYTES -- the oldest event's slot
  local tail = string.sub(events, 1, #events - start)
  redis.call('SET', key, string.rep('\0', HEADER_BYTES) .. string.sub(events, #events - start + 1) .. tail)
end

local function write(key, slot, events, first, last)
  if first <= last then
    redis.call('SETRANGE', key, HEADER_BYTES + slot * EVENT_BYTES, table.concat(events, '', first, last))
  end
end

-- Append to the ring; when there are more events than it holds, write the newest ones only.
local function append(key, header, events)
  local first = math.max(1, #events - header.cap + 1)
  local slot = (header.count + first - 1) % header.cap
  local last_before_wrap = math.min(#events, first + header.cap - slot - 1)
  header.count = header.count + #events
  if header.count >= MAX_COUNT then
    header.count = header.cap + MAX_COUNT % header.cap + header.count - MAX_COUNT
  end
  write(key, slot, events, first, last_before_wrap)
  write(key, 0, events, last_before_wrap + 1, #events)
end

local function pack_header(header)
  return struct.pack(HEADER, FORMAT, EVENT_BYTES, header.cap, header.count, header.source, header.last_offset,
    header.other_source, header.other_last_offset)
end

-- KEYS: the ring.
-- ARGS: cap, ttl_s, the header that the caller has cached ('' = no ring), source, end offset of its partition, entries
--       (offset i64 + event each).
-- Returns the number of appended events when the stored header equals the cached one, else the value before the push;
-- or {-1, last offset} when the source's last offset lies at or beyond the end of its partition.
local function push(keys, args)
  local key, cap, ttl_s, cached_header, source = keys[1], tonumber(args[1]), args[2], args[3], args[4]
  local stored_header = redis.call('GETRANGE', key, 0, HEADER_BYTES - 1)
  local header = read_header(key, stored_header)
  local value_before = stored_header ~= cached_header and (redis.call('GET', key) or '') or nil
  local last_offset = get_last_offset(header, source)
  if last_offset >= tonumber(args[5]) then
    return { -1, last_offset }
  end
  local events, new_last_offset = select_new_events(args[6], last_offset)
  if #events > 0 then
    if header.cap ~= cap then
      if header.cap then
        migrate(key, header, cap)
      end
      header.cap = cap
    end
    use_source(header, source)
    header.last_offset = new_last_offset
    append(key, header, events)
    redis.call('SETRANGE', key, 0, pack_header(header))
    redis.call('EXPIRE', key, ttl_s)
  end
  return value_before or #events
end

redis.register_function('millrace_push_VERSION', push)
