"""The event log in Redis: many processes, one truth.

What the log does:

- `log.py`: RedisLog: each operation of an `EventLog` as a few commands in one round trip
- `starting.py`: how runs come to be there, and come back after a loss
- `reaping.py`: how the runs of the dead are ended
- `wakeups.py`: one subscription per process and part; `listener.py`: one of them, and what is done when it breaks
- `lists.py`: where the lists of runs are
- `scripts/`: what must happen in one step inside Redis, as Lua
- `records.py`: the names of the keys, and how a run's record is written as a hash
- `replies.py`: what the scripts reply
- `refusals.py`: what Redis refuses, and what that means
- `requests.py`: the turns of thousands of readers and callers on a few connections

How it gets there:

- `servers.py`: what all of the above need of Redis, be it one server or many
- `addresses.py`: the URLs
- `client.py`: one server, also one that Sentinels name: redis-py on a trio-asyncio loop, and the only place that knows
  asyncio; `pools.py`: how its connections are made; `subscription.py`: one of them that listens
- `cluster.py`: the nodes of a cluster, each with a client; `slots.py`: which of them has what; `redirections.py`: what
  they reply that is no answer
"""
