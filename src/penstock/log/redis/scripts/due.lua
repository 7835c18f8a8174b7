-- The runs whose lease has run out, as far as the list of live runs knows.
--
-- KEYS  1 the list
-- ARGV  1 the first of them   2 the most of them
-- Reply {the time (ms), for reap.lua; the runs}
local now = redis.call('TIME')
local ms = string.format('%.0f', now[1] * 1000 + math.floor(now[2] / 1000))
return {ms, redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '(' .. ms, 'LIMIT', ARGV[1], ARGV[2])}
