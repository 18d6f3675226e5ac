#!lua name=millrace_sequences
-- A user's ring: 40 bytes of header, then events of 24 bytes, event j (of all ever appended) in slot j % cap.
--
--   0  u8   format (1)                 8  8 bytes  source of the events pushed last, 0 = none
--   1  u8   event_bytes (24)          16  i64      its last offset
--   2  u16  cap                       24  8 bytes  the other source
--   4  u32  count, ever appended      32  i64      its last offset
--
-- All little endian. A ring that is not full is only as long as its events.

local FORMAT, EVENT_BYTES, HEADER_BYTES = 1, 24, 40
local HEADER = '<BBI2I4c8i8c8i8'
local ENTRY_BYTES = 8 + EVENT_BYTES -- of the argument: an offset i64, then the event
local NO_SOURCE = '\0\0\0\0\0\0\0\0'
local MAX_COUNT = 2147483648 -- the count is taken back by whole rings before it outgrows its 32 bits

local function read_header(key, head)
  if #head == 0 then
    return { count = 0, source = NO_SOURCE, last = 0, other = NO_SOURCE, other_last = 0 }
  end
  local format, event_bytes = string.byte(head, 1, 2)
  if #head < HEADER_BYTES or format ~= FORMAT or event_bytes ~= EVENT_BYTES then
    error({ err = 'MILLRACEFORMAT ' .. key .. ' is no ring that this version can read (format ' ..
      tostring(format) .. ', ' .. tostring(event_bytes) .. ' bytes an event)' })
  end
  local _, _, cap, count, source, last, other, other_last = struct.unpack(HEADER, head)
  return { cap = cap, count = count, source = source, last = last, other = other, other_last = other_last }
end

-- Put `source` in front: known, moved up, or in place of the pair that was used less recently.
local function use_source(header, source)
  if header.source == source then
    return
  end
  local last = header.other == source and header.other_last or -1
  header.other, header.other_last = header.source, header.last
  header.source, header.last = source, last
end

-- The last offset of `source`, -1 when it is new.
local function last_offset(header, source)
  if header.source == source then
    return header.last
  end
  return header.other == source and header.other_last or -1
end

-- The events beyond `last`, and the last offset then.
local function fresh_events(entries, last)
  local fresh = {}
  for at = 1, #entries, ENTRY_BYTES do
    local offset = struct.unpack('<i8', entries, at)
    if offset > last then
      fresh[#fresh + 1] = string.sub(entries, at + 8, at + ENTRY_BYTES - 1)
      last = offset
    end
  end
  return fresh, last
end

-- Rewrite the ring for another cap, with its newest events.
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
    header.count = length -- what a smaller ring had dropped stays lost
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

-- Append to the ring; of more events than it holds only the newest are written.
local function append(key, header, events)
  local first = math.max(1, #events - header.cap + 1)
  local slot = (header.count + first - 1) % header.cap
  local turn = math.min(#events, first + header.cap - slot - 1) -- the last event before the ring's end
  header.count = header.count + #events
  if header.count >= MAX_COUNT then
    header.count = header.cap + MAX_COUNT % header.cap + header.count - MAX_COUNT
  end
  write(key, slot, events, first, turn)
  write(key, 0, events, turn + 1, #events)
end

local function packed(header)
  return struct.pack(HEADER, FORMAT, EVENT_BYTES, header.cap, header.count, header.source, header.last, header.other,
    header.other_last)
end

-- KEYS: the ring.
-- ARGS: cap, ttl_s, the header that the caller knows ('' = no ring), source, end offset of its partition, entries
--       (offset i64 + event, each), 'fresh' to drop the old ring first (or nothing).
-- Returns how many events were appended when the stored header was the known one; else the value as it was before;
-- or {-1, last offset} when the source's last offset lies at or beyond the end of its partition.
local function push(keys, args)
  local key, cap, ttl_s, known, source = keys[1], tonumber(args[1]), args[2], args[3], args[4]
  if args[7] == 'fresh' then
    redis.call('DEL', key)
  end
  local head = redis.call('GETRANGE', key, 0, HEADER_BYTES - 1)
  local header = read_header(key, head)
  local before = head ~= known and (redis.call('GET', key) or '') or nil
  local last = last_offset(header, source)
  if last >= tonumber(args[5]) then
    return { -1, last }
  end
  local events, newest = fresh_events(args[6], last)
  if #events > 0 then
    if header.cap ~= cap then
      if header.cap then
        migrate(key, header, cap)
      end
      header.cap = cap
    end
    use_source(header, source)
    header.last = newest
    append(key, header, events)
    redis.call('SETRANGE', key, 0, packed(header))
    redis.call('EXPIRE', key, ttl_s)
  end
  return before or #events
end

redis.register_function('millrace_push', push)
