-- A run's record, and a page of the entries after a cursor, read in one step.
--
-- KEYS  1 stream   2 record
-- ARGV  1 cursor   2 most entries   3 most bytes of data, which only the first entry may exceed
-- Reply {the record's fields and values, none if there is no record; seq, data, timestamp, ... of the entries}
--
-- The entries are read in growing steps, so that a page of large ones is never a page of hundreds of them.
local after, want, room = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local record, page, words, step = redis.call('HGETALL', KEYS[2]), {}, 0, 32
while #record > 0 and want > 0 do
  step = math.min(step, want)
  local entries = redis.call('XRANGE', KEYS[1], string.format('%d-0', after + 1), '+', 'COUNT', step)
  for at = 1, #entries do
    local fields = entries[at][2]
    local data = fields[4]
    room = room - #data
    if room < 0 and words > 0 then
      return {record, page}
    end
    page[words + 1], page[words + 2], page[words + 3] = fields[2], data, fields[6]
    words = words + 3
  end
  if #entries < step then
    break
  end
  after = tonumber(page[words - 2])
  want, step = want - step, step * 4
end
return {record, page}
