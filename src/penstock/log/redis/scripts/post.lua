-- Put a cancel request into the inbox of the run's owner, and wake it.
--
-- KEYS  1 inbox
-- ARGV  1 ttl (ms)   2 channel of the owner   3 what publishes there   4 run   5 reason, as JSON
-- Reply the number of processes that were woken
--
-- A full server lets it through: its first write is PEXPIRE.
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('HSET', KEYS[1], ARGV[4], ARGV[5])
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return redis.call(ARGV[3], ARGV[2], 'cancel')
