"""The wire format, Server-Sent Events: pure functions and values, independent of any event loop."""

from penstock.sse.events import Decoder, Event, Message

__all__ = ["Decoder", "Event", "Message"]
