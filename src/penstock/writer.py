"""A run that is written by hand: the body of a block is its producer."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio

from penstock.errors import RunCancelled, RunEnded
from penstock.runs import Cause

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from penstock.committer import Committer
    from penstock.execution import Execution
    from penstock.runs import Run


class RunWriter:
    """What a run is written with by hand. Made by `Supervisor.open_run`."""

    def __init__(self, execution: Execution, committer: Committer) -> None:
        self._execution = execution
        self._committer = committer

    @property
    def run(self) -> Run:
        """The run's record, as it was when it started."""
        return self._execution.run

    @property
    def id(self) -> str:
        """The run's id."""
        return self._execution.run.id

    async def write(self, chunk: Any) -> int:
        """Write a chunk; waits only while too much is uncommitted. A checkpoint.

        Args:
            chunk: an `Event`, or `str` or `bytes` holding whole SSE blocks.

        Returns:
            The seq of the chunk's last entry; of the entry before it if the chunk was dropped, because the run has been
            cancelled and the body is still writing.

        Raises:
            InvalidChunk: it is not a chunk; nothing of it is stored.
            RunEnded: an earlier chunk has ended the run (`[DONE]`, an error event), or the block has been left.
        """
        await trio.lowlevel.checkpoint()
        if self._execution.ended:
            raise RunEnded(self.id)
        if not await self._execution.write(chunk):
            self._execution.finish()
        return self._execution.outbox.seq

    async def flush(self) -> None:
        """Wait until the log has acknowledged all that was written. A checkpoint."""
        await self._committer.flush(self._execution.outbox)


@asynccontextmanager
async def writing(execution: Execution, committer: Committer) -> AsyncIterator[RunWriter]:
    """Let the block be the producer of `execution`; see `Supervisor.open_run`."""
    execution.task = trio.lowlevel.current_task()
    raised: BaseException | None = None
    cut_short = False
    try:
        with execution.scope:
            try:
                yield RunWriter(execution, committer)
            except BaseException as error:
                cut_short = _holds_cancelled(error)
                execution.finish(error)
                raise
            execution.finish()
    except BaseException as error:
        raised = error
        raise
    finally:
        await execution.leave(raised)  # noqa: ASYNC102  (it has its own shield, with a deadline)
        raised = None  # its traceback holds this frame
    if cut_short and execution.cause is Cause.CANCEL:
        raise RunCancelled(execution.run.id, execution.words)
    if cut_short:
        raise RunEnded(execution.run.id, execution.run)


def _holds_cancelled(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return error.subgroup(trio.Cancelled) is not None
    return isinstance(error, trio.Cancelled)
