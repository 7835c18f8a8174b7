-- Put a cancel request on record. (The owner's inbox is on another slot: see post.lua.)
--
-- KEYS  1 stream   2 record
-- ARGV  1 token of this request   2 ttl (ms)   3 "1" if there is a reason   4 the reason
-- Reply {"GONE" | "ENDED" | "REPEATED" | "REQUESTED"; the record's fields and values, as they are now}
--
-- From the reply on no `completed` ending is taken. Sent twice it is REQUESTED both times. A full server lets it
-- through: its first write is PEXPIRE.
local record = redis.call('HMGET', KEYS[2], 'status', 'cancelled', 'lease')
local status = 'REQUESTED'
if not record[1] then
  return {'GONE', {}}
elseif record[1] ~= 'running' then
  status = 'ENDED'
elseif not record[2] then
  local ttl = math.max(tonumber(ARGV[2]), 4 * record[3])
  redis.call('PEXPIRE', KEYS[1], ttl)
  redis.call('PEXPIRE', KEYS[2], ttl)
  redis.call('HSET', KEYS[2], 'cancelled', ARGV[1])
  if ARGV[3] == '1' then
    redis.call('HSET', KEYS[2], 'cancel_reason', ARGV[4])
  end
elseif record[2] ~= ARGV[1] then
  status = 'REPEATED'
end
return {status, redis.call('HGETALL', KEYS[2])}
