#!lua name=millrace_counters
-- An item's shared counts: 20 bytes of header, then its neighbours, 12 bytes each. All little endian.
--
--   0  u8   format (1)              2  u16  neighbours            12  f64  popularity
--   1  u8   bytes per pair (12)     4  i64  as_of_ms              20  (item hash u64, count f32) ...
--
-- All counts are as of `as_of_ms`, an event time: they halve with every half life after it.

local HEADER, HEADER_BYTES = '<BBI2i8d', 20
local FORMAT, PAIR_BYTES = 1, 12
-- A quarter of a full row is reserved for the heaviest newcomers of a delta: otherwise an item that is rare in each
-- delta could never grow.
local NEWCOMER_DIVISOR = 4

-- Add pairs, their counts times `factor`, to the entries: `items` and `counts` in order of arrival, `index_of` by item.
local function read_pairs(pairs_bytes, first, factor, items, counts, index_of)
  for at = first, #pairs_bytes, PAIR_BYTES do
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

-- Return the row's bytes. `selected`: the indices to keep, nil for all.
local function pack_row(as_of_ms, popularity, items, counts, selected)
  local parts = { '' }
  for index, item in ipairs(items) do
    if not selected or selected[index] then
      parts[#parts + 1] = item .. struct.pack('<f', counts[index])
    end
  end
  parts[1] = struct.pack(HEADER, FORMAT, PAIR_BYTES, #parts - 1, as_of_ms, popularity)
  return table.concat(parts)
end

-- KEYS: the item's row.
-- ARGS: as_of_ms, half_life_ms, neighbours to keep, ttl_s, popularity, pairs (hash u64, count f32 each; the heaviest
--       first), 'absent' to count only when there is no row yet, and the latest time that a row may be of.
-- Returns the merged row.
local function count(keys, args)
  local as_of_ms, half_life_ms = tonumber(args[1]), tonumber(args[2])
  local row = redis.call('GET', keys[1])
  if row and args[7] == 'absent' then
    return row
  end
  local items, counts, index_of, popularity, stored_ms = {}, {}, {}, 0, as_of_ms
  if row then
    local format, pair_bytes = string.byte(row, 1, 2)
    if format ~= FORMAT or pair_bytes ~= PAIR_BYTES then
      return redis.error_reply('MILLRACEFORMAT ' .. keys[1] .. ' has counts of format ' .. tostring(format))
    end
    local _, _, _, ms, total = struct.unpack(HEADER, row)
    stored_ms, popularity = ms, total
    if ms > tonumber(args[8]) then
      stored_ms = as_of_ms -- no event is of such a time: a row that stayed there would outlive every later count
    end
  end
  local latest_ms = math.max(as_of_ms, stored_ms)
  local stored_decay = 2 ^ ((stored_ms - latest_ms) / half_life_ms)
  local delta_decay = 2 ^ ((as_of_ms - latest_ms) / half_life_ms)
  if row then
    read_pairs(row, HEADER_BYTES + 1, stored_decay, items, counts, index_of)
  end
  local stored, limit = #items, tonumber(args[3])
  read_pairs(args[6], 1, delta_decay, items, counts, index_of)
  popularity = popularity * stored_decay + tonumber(args[5]) * delta_decay
  local selected = #items > limit and select_heaviest(counts, limit, stored) or nil
  local merged = pack_row(latest_ms, popularity, items, counts, selected)
  redis.call('SET', keys[1], merged, 'EX', args[4])
  return merged
end

redis.register_function('millrace_count', count)
