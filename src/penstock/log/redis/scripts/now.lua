-- The time by the clock of the server that has a key.
--
-- KEYS  1 any key
-- Reply the time (ms), for reap.lua
local now = redis.call('TIME')
return string.format('%.0f', now[1] * 1000 + math.floor(now[2] / 1000))
