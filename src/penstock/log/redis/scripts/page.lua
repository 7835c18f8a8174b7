-- A run's record, and a page of the entries after a cursor, read in one step.
--
-- KEYS  1 stream   2 record
-- ARGV  1 cursor   2 most entries   3 most bytes of data, which only the first entry may exceed
-- Reply {the record's fields and values, none if there is no record; seq, data, timestamp, ... of the entries}
--
-- The entries are read in growing steps, so that a page of large ones is never a page of hundreds of them.
local after, want, room = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local record, page, step = redis.call('HGETALL', KEYS[2]), {}, 32
while #record > 0 and want > 0 do
  step = math.min(step, want)
  local entries = redis.call('XRANGE', KEYS[1], string.format('%d-0', after + 1), '+', 'COUNT', step)
  for _, entry in ipairs(entries) do
    local fields = entry[2]
    room = room - #fields[4]
    if room < 0 and #page > 0 then
      return {record, page}
    end
    page[#page + 1], page[#page + 2], page[#page + 3] = fields[2], fields[4], fields[6]
    after = tonumber(fields[2])
  end
  if #entries < step then
    break
  end
  want, step = want - step, step * 4
end
return {record, page}
