"""The wire format, Server-Sent Events: pure functions and values, which know no event loop."""

from penstock.sse.events import Decoder, Event, Message

__all__ = ["Decoder", "Event", "Message"]
