-- End a run whose lease has run out, in the name of nobody: its owner is fenced from then on.
--
-- KEYS  1 stream   2 record
-- ARGV  1 the time at which it was due (ms, from due.lua or now.lua)   2 for how long the run has been here (ms)
--       3 ttl (ms)   4 wake-up channel   5 what publishes there   6 number of the ending's fields and values
--       then these   then the data of the last entries
-- Reply {"GONE" | "ENDED" | "OK" (the lease goes on) | "FENCED" (reaped by this call); ms to the lease's end}
--
-- The lease must have been over at the time of due.lua: a server that stood still in between, with this call in its
-- socket, kills nobody. A full server lets it through: its first write is PEXPIRE.
local record = redis.call('HMGET', KEYS[2], 'status', 'seq', 'lease_end', 'lease')
if not record[1] then
  return {'GONE', 0}
elseif record[1] ~= 'running' then
  return {'ENDED', 0}
elseif tonumber(record[3]) >= tonumber(ARGV[1]) then
  return {'OK', record[3] - ARGV[1]}
elseif tonumber(ARGV[2]) < tonumber(record[4]) then -- the clock that has set the lease's end may be another
  return {'OK', record[4] - ARGV[2]}
end
redis.call('PEXPIRE', KEYS[2], ARGV[3])
local now, fields, seq = redis.call('TIME'), tonumber(ARGV[6]), tonumber(record[2])
local stamp = string.format('%.0f', now[1] * 1000 + math.floor(now[2] / 1000))
for at = 7 + fields, #ARGV do
  seq = seq + 1
  local id = string.format('%d', seq)
  if at == #ARGV then
    redis.call('XADD', KEYS[1], id .. '-0', 'seq_id', id, 'data', ARGV[at], 'timestamp', stamp, 'complete', 'true')
  else
    redis.call('XADD', KEYS[1], id .. '-0', 'seq_id', id, 'data', ARGV[at], 'timestamp', stamp)
  end
end
redis.call('HSET', KEYS[2], 'epoch', '', 'seq', string.format('%d', seq),
  'ended_at', string.format('%d.%06d', now[1], now[2]), unpack(ARGV, 7, 6 + fields))
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
redis.call(ARGV[5], ARGV[4], string.format('%d', seq))
return {'FENCED', 0}
