-- Renew the leases of an owner's runs, and the time for which their history is kept.
--
-- KEYS  stream, record, ... of each run
-- ARGV  1 lease (ms)   2 ttl (ms)   then the epoch of each run
-- Reply {status, "1" if a cancel is on record, its reason or nil} for each run; OK, FENCED, ENDED, GONE or REFUSED
--       (what lies there is no record; the other runs are renewed all the same)
--
-- A full server lets it through: its first write is PEXPIRE.
local now = redis.call('TIME')
local lease_end = string.format('%.0f', now[1] * 1000 + math.floor(now[2] / 1000) + ARGV[1])
local ttl = math.max(tonumber(ARGV[2]), 4 * ARGV[1])
local replies = {}
for n = 1, #ARGV - 2 do
  local stream, key = KEYS[2 * n - 1], KEYS[2 * n]
  local record = redis.pcall('HMGET', key, 'epoch', 'status', 'cancelled', 'cancel_reason')
  local status = 'OK'
  if record.err then
    status = 'REFUSED'
  elseif not record[1] then
    status = 'GONE'
  elseif record[1] ~= ARGV[n + 2] then
    status = 'FENCED'
  elseif record[2] ~= 'running' then
    status = 'ENDED'
  else
    redis.call('PEXPIRE', key, ttl)
    redis.call('PEXPIRE', stream, ttl)
    redis.call('HSET', key, 'lease', ARGV[1], 'lease_end', lease_end)
  end
  replies[n] = {status, record[3] or '', record[4] or false} -- an array that is replied ends at its first nil
end
return replies
