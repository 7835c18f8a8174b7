-- Put back what the server has lost of a run, from its owner's copy: the record, or how far the stream goes.
--
-- KEYS  1 stream   2 record
-- ARGV  1 epoch   2 ttl (ms)   3 lease (ms)   4 the oldest seq that the owner has at hand   then the record's fields
--       and values
-- Reply {"OK" | "HOLE" (what there was is dropped, and the owner's history begins at its oldest seq) | "FENCED" |
--       "ENDED"; last seq}
--
-- The last seq is that of the stream itself. On a full server it is refused whole: its first write is HSET.
local record = redis.call('HMGET', KEYS[2], 'epoch', 'status', 'seq')
if record[1] and record[1] ~= ARGV[1] then
  return {'FENCED', tonumber(record[3])}
elseif record[1] and record[2] ~= 'running' then
  return {'ENDED', tonumber(record[3])}
end
local newest = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
local last = newest and tonumber(newest[2][2]) or 0
local status = last < ARGV[4] - 1 and 'HOLE' or 'OK'
if newest and newest[2][7] then
  -- Its record is lost, but not what came with it: the run has ended, and not by this owner.
  return {'FENCED', last}
end
if status == 'HOLE' then
  last = ARGV[4] - 1
end
local now = redis.call('TIME')
local lease_end = string.format('%.0f', now[1] * 1000 + math.floor(now[2] / 1000) + ARGV[3])
local seq = string.format('%d', last)
if record[1] then
  redis.call('HSET', KEYS[2], 'seq', seq, 'lease_end', lease_end)
else
  redis.call('HSET', KEYS[2], 'epoch', ARGV[1], 'lease', ARGV[3], 'lease_end', lease_end, unpack(ARGV, 5))
  redis.call('HSET', KEYS[2], 'seq', seq)
end
if status == 'HOLE' then
  redis.call('DEL', KEYS[1])
end
if status == 'HOLE' or not newest then
  redis.call('HSET', KEYS[2], 'base', seq) -- up to here there need not be any stream
end
local ttl = math.max(tonumber(ARGV[2]), 4 * ARGV[3])
redis.call('PEXPIRE', KEYS[1], ttl)
redis.call('PEXPIRE', KEYS[2], ttl)
return {status, last}
