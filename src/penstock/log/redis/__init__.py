"""The event log in Redis: many processes, one truth.

log.py       RedisLog: each operation of an `EventLog` as a few commands in one round trip
wakeups.py   one subscription per process, and what is done when it breaks
scripts/     what must happen in one step inside Redis, as Lua
records.py   how a run's record is written as a hash, and the names of the keys
client.py    the only place that knows asyncio: redis-py on a trio-asyncio loop
"""
