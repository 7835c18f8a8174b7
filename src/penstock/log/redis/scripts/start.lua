-- Create a run's record, so that any reader finds it from the reply on.
--
-- KEYS  1 stream   2 record
-- ARGV  1 epoch   2 ttl (ms)   3 lease (ms)   then the record's fields and values
-- Reply {"1" if the record is this start's, else "0"; the record's fields and values}
--
-- A start that is sent twice creates one record. On a full server it is refused whole: its first write is HSET.
local epoch = redis.call('HGET', KEYS[2], 'epoch')
if not epoch then
  local now = redis.call('TIME')
  redis.call('HSET', KEYS[2], 'epoch', ARGV[1], 'lease', ARGV[3],
    'lease_end', string.format('%.0f', now[1] * 1000 + math.floor(now[2] / 1000) + ARGV[3]),
    'started_at', string.format('%d.%06d', now[1], now[2]), unpack(ARGV, 4))
  redis.call('PEXPIRE', KEYS[2], math.max(tonumber(ARGV[2]), 4 * ARGV[3]))
  redis.call('DEL', KEYS[1]) -- of an older run with this id, whose record has expired
  epoch = ARGV[1]
end
return {epoch == ARGV[1] and '1' or '0', redis.call('HGETALL', KEYS[2])}
