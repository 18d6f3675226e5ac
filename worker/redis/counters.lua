#!lua name=millrace_counters
-- An item's shared counts: 20 bytes of header, then its neighbours, 12 bytes each. All little endian.
--
--   0  u8   format (1)        2  u16  neighbours            12  f64  popularity
--   1  u8   12, bytes each    4  i64  as_of_ms              20  (item hash u64, count f32) ...
--
-- All counts are as of `as_of_ms`, an event time: they halve every half life after it.

local HEADER, HEADER_BYTES = '<BBI2i8d', 20
local FORMAT, PAIR_BYTES = 1, 12
-- Of a full row this share is kept for the heaviest newcomers of a delta, or what is rare in one delta could never grow.
local NEWCOMERS = 4

-- Add pairs to the entries: `items` and `counts` in the order of their coming, `places` by item.
local function read_pairs(pairs_bytes, first, factor, items, counts, places)
  for at = first, #pairs_bytes, PAIR_BYTES do
    local item = string.sub(pairs_bytes, at, at + 7)
    local count = struct.unpack('<f', pairs_bytes, at + 8) * factor
    local place = places[item]
    if place then
      counts[place] = counts[place] + count
    else
      items[#items + 1], counts[#counts + 1], places[item] = item, count, #items + 1
    end
  end
end

-- Mark what stays of more than `limit` entries: the heaviest, but a part of the room for newcomers, which come behind
-- place `stored`, the heaviest first.
local function keep(counts, limit, stored)
  local sorted, kept, room = {}, {}, limit
  for place, count in ipairs(counts) do
    sorted[place] = count
  end
  table.sort(sorted) -- plain numbers: a comparator would take three times as long
  local function fill(least, first, most)
    for place = first, #counts do
      if room > most and not kept[place] and counts[place] >= least then
        kept[place], room = true, room - 1
      end
    end
  end
  local newcomers = math.floor(limit / NEWCOMERS)
  fill(sorted[#sorted - (limit - newcomers) + 1], 1, newcomers)
  fill(0, stored + 1, 0)
  fill(sorted[#sorted - limit + 1], 1, 0)
  return kept
end

local function packed(as_of_ms, popularity, items, counts, kept)
  local parts = { '' }
  for place, item in ipairs(items) do
    if not kept or kept[place] then
      parts[#parts + 1] = item .. struct.pack('<f', counts[place])
    end
  end
  parts[1] = struct.pack(HEADER, FORMAT, PAIR_BYTES, #parts - 1, as_of_ms, popularity)
  return table.concat(parts)
end

-- KEYS: the item's row.
-- ARGS: as_of_ms, half_life_ms, neighbours kept, ttl_s, popularity, pairs (hash u64, count f32, each; the heaviest first),
--       and 'absent' when they count only where there is no row yet (or nothing).
-- Returns the merged row.
local function count(keys, args)
  local as_of_ms, half_life_ms = tonumber(args[1]), tonumber(args[2])
  local row = redis.call('GET', keys[1])
  if row and args[7] == 'absent' then
    return row
  end
  local items, counts, places, popularity, stored_ms = {}, {}, {}, 0, as_of_ms
  if row then
    local format, pair_bytes = string.byte(row, 1, 2)
    if format ~= FORMAT or pair_bytes ~= PAIR_BYTES then
      return redis.error_reply('MILLRACEFORMAT ' .. keys[1] .. ' has counts of format ' .. tostring(format))
    end
    local _, _, _, ms, total = struct.unpack(HEADER, row)
    stored_ms, popularity = ms, total
  end
  local newest_ms = math.max(as_of_ms, stored_ms)
  local aged, young = 2 ^ ((stored_ms - newest_ms) / half_life_ms), 2 ^ ((as_of_ms - newest_ms) / half_life_ms)
  if row then
    read_pairs(row, HEADER_BYTES + 1, aged, items, counts, places)
  end
  local stored, limit = #items, tonumber(args[3])
  read_pairs(args[6], 1, young, items, counts, places)
  popularity = popularity * aged + tonumber(args[5]) * young
  local kept = #items > limit and keep(counts, limit, stored) or nil
  local merged = packed(newest_ms, popularity, items, counts, kept)
  redis.call('SET', keys[1], merged, 'EX', args[4])
  return merged
end

redis.register_function('millrace_count', count)
