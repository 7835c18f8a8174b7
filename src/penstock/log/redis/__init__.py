"""RedisLog: the event log in Redis, which many processes share.

The operations are in `log.py`, `start.py`, `reap.py` and `notifications.py`, with what must happen in one step inside
Redis in `scripts/`. The way there is `backend.py`: `client.py` for one server, `cluster.py` for the nodes of a cluster.
"""
