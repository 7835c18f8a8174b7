"""A resumable agent endpoint: an agent that answers word by word, and other producers to try a server with.

Run it:    penstock serve --producers examples/agent.py:producers        (or: just serve)
Try it:    curl -N -d '{"producer": "agent", "input": "hello", "stream": true}' http://127.0.0.1:8000/v1/runs
Watch it:  http://127.0.0.1:8000/

The same application from Trio:              python examples/agent.py
The same application under plain Hypercorn:  hypercorn -k trio examples/agent.py:app

What is lost under plain Hypercorn is the drain: at a signal it cancels the streams, and only then tells the
application, whose runs then have `drain_timeout` to end. So their readers are told `retry:` instead of seeing the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import trio

from penstock import Event, PublicError, command, create_app, serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ANSWER: Final = (
    'You said: "{prompt}". Cut the connection now, and come back: this answer goes on without you, and no word of it '
    "is lost or comes twice. Press cancel, and it stops at the word it has come to, whoever else is reading."
)


async def agent(prompt: Any) -> AsyncIterator[Event]:
    """An answer in small pieces, as language models give them; `prompt` is the request's input.

    What it says at the end is its stop reason, and becomes that of the run.
    """
    yield Event.json({"message_type": "reasoning_message", "reasoning": "The user wants to see a stream."})
    await trio.sleep(0.3)
    for word in ANSWER.format(prompt=prompt or "nothing").split(" "):
        yield Event.json({"message_type": "assistant_message", "content": word + " "})
        await trio.sleep(0.08)
    yield Event.stop("end_turn")


async def countdown(seconds: Any) -> AsyncIterator[Event]:
    """One event a second, `seconds` of them (10, if that is no whole number above 0); then lift-off."""
    for left in range(seconds if isinstance(seconds, int) and seconds > 0 else 10, 0, -1):
        yield Event(data=str(left))
        await trio.sleep(1)
    yield Event(data="lift-off")


async def silent(_input: Any) -> AsyncIterator[Event]:
    """Nothing for an hour: a stream of pings, until somebody cancels the run."""
    try:
        await trio.sleep(3600)
    except trio.Cancelled as cancelled:
        print(f"silent: stopped after all ({cancelled.reason})")
        raise
    yield Event(data="an hour later")


async def failing(message: Any) -> AsyncIterator[Event]:
    """Fails half-way. Readers get the words of a `PublicError`; of any other exception, an error id only."""
    yield Event(data="so far, so good")
    await trio.sleep(0.5)
    raise PublicError(str(message or "out of luck"), code="OUT_OF_LUCK")


producers = {
    "agent": agent,
    "countdown": countdown,
    "failing": failing,
    "files": lambda _input: command(["ls", "-la"]),
    "silent": silent,
}

app = create_app(producers)

if __name__ == "__main__":
    trio.run(serve, app)
