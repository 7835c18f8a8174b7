-- Take back a start that nobody knows the reply to, before anything was written.
--
-- KEYS  1 record
-- ARGV  1 epoch
-- Reply 1 if the record is gone, else 0
local record = redis.call('HMGET', KEYS[1], 'epoch', 'seq', 'status')
if record[1] == ARGV[1] and record[2] == '0' and record[3] == 'running' then
  return redis.call('DEL', KEYS[1])
end
return 0
