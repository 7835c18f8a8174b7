"""RedisLog: the event log in Redis, which many processes share.

The operations of the log:

- `log.py`: RedisLog; each operation of an `EventLog` is a few commands in one round trip
- `start.py`: starts runs, restores lost ones, keeps their idempotency keys
- `reap.py`: ends runs whose lease has expired
- `notifications.py`: one subscription connection per process and shard
- `indexes.py`: the indexes in which runs are listed
- `schema.py`: the names of the keys, the record as a hash, the replies of the scripts
- `scripts/`: what must happen in one step inside Redis, as Lua

The way to Redis:

- `backend.py`: what the log needs of one server or of a cluster; the limit on requests under way
- `client.py`: one server, also one that Sentinels name; the only file that knows asyncio
- `cluster.py`: the nodes of a cluster, each with a client, and where keys are
- `slots.py`: which node has which slots, as the cluster says
- `urls.py`: the URLs, and the pools of connections that they describe
- `errors.py`: what Redis refuses, and what that means
"""
