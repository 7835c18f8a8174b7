"""Runs, in the process that owns or reads them."""

from penstock.supervisor.execution import RunWriter
from penstock.supervisor.follower import Follower
from penstock.supervisor.settings import Settings
from penstock.supervisor.supervisor import Supervisor, open_supervisor

__all__ = ["Follower", "RunWriter", "Settings", "Supervisor", "open_supervisor"]
