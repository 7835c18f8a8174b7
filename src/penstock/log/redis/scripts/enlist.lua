-- Note in the list of live runs when their leases end: where the reaper looks first. The records decide.
--
-- KEYS  1 the list
-- ARGV  1 lease (ms) from now   2 "1": only runs that are not there yet   then the runs
-- Reply nil
--
-- A full server lets it through: its first write is PERSIST.
redis.call('PERSIST', KEYS[1])
local now = redis.call('TIME')
local lease_end = string.format('%.0f', now[1] * 1000 + math.floor(now[2] / 1000) + ARGV[1])
for n = 3, #ARGV do
  if ARGV[2] == '1' then
    redis.call('ZADD', KEYS[1], 'NX', lease_end, ARGV[n])
  else
    redis.call('ZADD', KEYS[1], lease_end, ARGV[n])
  end
end
