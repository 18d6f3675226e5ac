#!lua name=millrace_counters_VERSION
-- An item's shared counts: 20 bytes of header, its neighbours, 12 bytes each, and the marks of its latest merges, 8
-- bytes each: the process u32 and the number of its merge u32, the latest merge first. All little endian.
--
--   0  u8   format (2)              2  u16  neighbours            12  f64  popularity
--   1  u8   bytes per pair (12)     4  i64  as_of_ms              20  (item hash u64, count f32) ...
--
-- All counts are as of `as_of_ms`, an event time: they halve with every half life after it. A row of format 1 has no
-- marks. A merge whose mark the row has already is a repetition and changes nothing.

local HEADER, HEADER_BYTES = '<BBI2i8d', 20
local FORMAT, WITHOUT_MARKS, PAIR_BYTES, MARK_BYTES, WRITER_BYTES = 2, 1, 12, 8, 4
-- A merge is repeated in its process's next round. Until then at most as many others have merged as there are workers.
local MAX_MARKS = 16
-- A quarter of a full row is reserved for the heaviest newcomers of a delta: otherwise an item that is rare in each
-- delta could never grow.
local NEWCOMER_DIVISOR = 4

-- Add pairs, their counts times `factor`, to the entries: `items` and `counts` in order of arrival, `index_of` by item.
local function read_pairs(pairs_bytes, first, last, factor, items, counts, index_of)
  for at = first, last, PAIR_BYTES do
    local item = string.sub(pairs_bytes, at, at + 7)
    local count = struct.unpack('<f', pairs_bytes, at + 8) * factor
    local index = index_of[item]
    if index then
      counts[index] = counts[index] + count
    else
      items[#items + 1], counts[#counts + 1], index_of[item] = item, count, #items + 1
    end
  end
end

-- Return the set of indices to keep of more than `limit` entries: the heaviest ones, with some slots reserved for
-- newcomers. Newcomers have the indices after `stored`, the heaviest first.
local function select_heaviest(counts, limit, stored)
  local sorted, selected, free = {}, {}, limit
  for index, count in ipairs(counts) do
    sorted[index] = count
  end
  table.sort(sorted) -- plain numbers: a comparator would take three times as long
  -- Select entries from index `first` on that count at least `least`, until `reserved` slots are left.
  local function fill(least, first, reserved)
    for index = first, #counts do
      if free > reserved and not selected[index] and counts[index] >= least then
        selected[index], free = true, free - 1
      end
    end
  end
  local newcomers = math.floor(limit / NEWCOMER_DIVISOR)
  fill(sorted[#sorted - (limit - newcomers) + 1], 1, newcomers)
  fill(0, stored + 1, 0)
  fill(sorted[#sorted - limit + 1], 1, 0)
  return selected
end

-- Return the marks with this one first, of each process the latest; nil when it is a repetition.
local function add_mark(marks, mark)
  local writer, number = string.sub(mark, 1, WRITER_BYTES), struct.unpack('<I4', mark, WRITER_BYTES + 1)
  local kept = { mark }
  for at = 1, #marks, MARK_BYTES do
    if string.sub(marks, at, at + WRITER_BYTES - 1) == writer then
      if struct.unpack('<I4', marks, at + WRITER_BYTES) >= number then
        return nil
      end
    elseif #kept < MAX_MARKS then
      kept[#kept + 1] = string.sub(marks, at, at + MARK_BYTES - 1)
    end
  end
  return table.concat(kept)
end

-- Return the row's bytes. `selected`: the indices to keep, nil for all.
local function pack_row(as_of_ms, popularity, items, counts, selected, marks)
  local parts = { '' }
  for index, item in ipairs(items) do
    if not selected or selected[index] then
      parts[#parts + 1] = item .. struct.pack('<f', counts[index])
    end
  end
  parts[1] = struct.pack(HEADER, FORMAT, PAIR_BYTES, #parts - 1, as_of_ms, popularity)
  parts[#parts + 1] = marks
  return table.concat(parts)
end

-- KEYS: the item's row.
-- ARGS: as_of_ms, half_life_ms, neighbours to keep, ttl_s, popularity, pairs (hash u64, count f32 each; the heaviest
--       first), 'absent' to count only when there is no row yet, the latest time that a row may be of, and the mark.
-- Returns the merged row.
local function count(keys, args)
  local as_of_ms, half_life_ms = tonumber(args[1]), tonumber(args[2])
  local row = redis.call('GET', keys[1])
  if row and args[7] == 'absent' then
    return row
  end
  local items, counts, index_of, popularity, stored_ms = {}, {}, {}, 0, as_of_ms
  local marks, pairs_end = '', HEADER_BYTES
  if row then
    local format, pair_bytes = string.byte(row, 1, 2)
    if (format ~= FORMAT and format ~= WITHOUT_MARKS) or pair_bytes ~= PAIR_BYTES then
      return redis.error_reply('MILLRACEFORMAT ' .. keys[1] .. ' has counts of format ' .. tostring(format))
    end
    local stored_pairs, ms, total = select(3, struct.unpack(HEADER, row))
    pairs_end = HEADER_BYTES + stored_pairs * PAIR_BYTES
    marks = string.sub(row, pairs_end + 1)
    if #row < pairs_end or #marks % MARK_BYTES ~= 0 then
      return redis.error_reply('MILLRACEFORMAT ' .. keys[1] .. ' has ' .. #row .. ' bytes')
    end
    stored_ms, popularity = ms, total
    if ms > tonumber(args[8]) then
      stored_ms = as_of_ms -- no event is of such a time: a row that stayed there would outlive every later count
    end
  end
  marks = add_mark(marks, args[9])
  if not marks then
    return row
  end
  local latest_ms = math.max(as_of_ms, stored_ms)
  local stored_decay = 2 ^ ((stored_ms - latest_ms) / half_life_ms)
  local delta_decay = 2 ^ ((as_of_ms - latest_ms) / half_life_ms)
  if row then
    read_pairs(row, HEADER_BYTES + 1, pairs_end, stored_decay, items, counts, index_of)
  end
  local stored, limit = #items, tonumber(args[3])
  read_pairs(args[6], 1, #args[6], delta_decay, items, counts, index_of)
  popularity = popularity * stored_decay + tonumber(args[5]) * delta_decay
  local selected = #items > limit and select_heaviest(counts, limit, stored) or nil
  local merged = pack_row(latest_ms, popularity, items, counts, selected, marks)
  redis.call('SET', keys[1], merged, 'EX', args[4])
  return merged
end

redis.register_function('millrace_count_VERSION', count)
