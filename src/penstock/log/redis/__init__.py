"""The event log in Redis: many processes, one truth.

- `log.py`: RedisLog: each operation of an `EventLog` as a few commands in one round trip
- `starting.py`: how runs come to be there, and come back after a loss
- `wakeups.py`: one subscription per process, and what is done when it breaks
- `scripts/`: what must happen in one step inside Redis, as Lua
- `records.py`: the names of the keys, and how a run's record is written as a hash
- `replies.py`: what the scripts reply
- `refusals.py`: what Redis refuses, and what that means
- `requests.py`: the turns of thousands of readers and callers on a few connections
- `client.py`: the only place that knows asyncio: redis-py on a trio-asyncio loop
"""
