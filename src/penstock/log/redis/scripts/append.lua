-- Append entries of one run; and, with the last of them, end it.
--
-- KEYS  1 stream   2 record
-- ARGV  1 epoch   2 ttl (ms)   3 entries to keep   4 seq of the first entry   5 "1": part of what ends the run
--       6 number of the ending's fields and values, 0 for none   then these, `status` first   then the entries:
--       all of them as they leave on the wire, each with its `id` line; their lengths (uint32, little-endian); their
--       timestamps (double, little-endian). Three words, however many entries: words cost both sides more than bytes.
--       Then the wake-up channel, and the command that publishes there. (A channel among the keys would be a key that
--       is never there: in a cluster no append would be taken while its slot is being moved.)
-- Reply {status, last seq, "1" if a cancel is on record, its reason or nil}
--
-- Checked in this order: no record: GONE; another epoch: FENCED; not running: OK if all of it is there, else ENDED;
-- first seq beyond last + 1: HOLE; completed, but a cancel is on record: CANCELLED; else what is missing is added: OK.
-- All of it is stored or nothing: on a full server the first write, XADD, is refused. What ends a run is let through
-- there, since its first write, PEXPIRE, never is. What is sent twice is stored once.
local record = redis.call('HMGET', KEYS[2], 'epoch', 'status', 'seq', 'cancelled', 'cancel_reason', 'lease', 'base')
if not record[1] then
  return {'GONE', 0, '', false}
end
local last = tonumber(record[3])
local function reply(status)
  return {status, last, record[4] or '', record[5]}
end
if record[1] ~= ARGV[1] then
  return reply('FENCED')
end
local first, fields = tonumber(ARGV[4]), tonumber(ARGV[6])
local wire, lengths, timestamps = ARGV[7 + fields], ARGV[8 + fields], ARGV[9 + fields]
local upto = first + #lengths / 4 - 1
if record[2] ~= 'running' then
  return reply(upto <= last and 'OK' or 'ENDED')
end
if first > last + 1 then
  return reply('HOLE')
end
if fields > 0 and ARGV[8] == 'completed' and record[4] then
  return reply('CANCELLED')
end
-- Whoever is dead for so long that its record expires before anybody has reaped it is gone as well.
local ttl = math.max(tonumber(ARGV[2]), fields > 0 and 0 or 4 * tonumber(record[6]))
if ARGV[5] == '1' or upto <= last then
  redis.call('PEXPIRE', KEYS[2], ttl)
end
local at, stamp, timestamp = 1, nil, nil
for seq = first, upto do
  local size = struct.unpack('<I4', lengths, 4 * (seq - first) + 1)
  if seq > last then
    local id = string.format('%d', seq)
    local data = string.sub(wire, at + 5 + #id, at + size - 1) -- without "id: SEQ\n"
    local written = struct.unpack('<d', timestamps, 8 * (seq - first) + 1)
    if written ~= stamp then
      stamp, timestamp = written, string.format('%.0f', written)
    end
    if seq == last + 1 and last > tonumber(record[7] or 0) and redis.call('EXISTS', KEYS[1]) == 0 then
      last = 0 -- the stream was lost without its record, perhaps evicted
      return reply('HOLE')
    end
    if fields > 0 and seq == upto then
      redis.call('XADD', KEYS[1], id .. '-0', 'seq_id', id, 'data', data, 'timestamp', timestamp, 'complete', 'true')
    else
      redis.call('XADD', KEYS[1], id .. '-0', 'seq_id', id, 'data', data, 'timestamp', timestamp)
    end
  end
  at = at + size
end
last = math.max(last, upto)
redis.call('XTRIM', KEYS[1], 'MAXLEN', '~', ARGV[3])
local now = redis.call('TIME')
local update = {'seq', string.format('%d', last)}
if fields > 0 then
  for at = 7, 6 + fields do
    update[#update + 1] = ARGV[at]
  end
  update[#update + 1] = 'ended_at'
  update[#update + 1] = string.format('%d.%06d', now[1], now[2])
else
  update[#update + 1] = 'lease_end'
  update[#update + 1] = string.format('%.0f', now[1] * 1000 + math.floor(now[2] / 1000) + record[6])
end
redis.call('HSET', KEYS[2], unpack(update))
redis.call('PEXPIRE', KEYS[1], ttl)
redis.call('PEXPIRE', KEYS[2], ttl)
redis.call(ARGV[11 + fields], ARGV[10 + fields], string.format('%d', last))
return reply('OK')
