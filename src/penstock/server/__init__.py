"""Hypercorn's trio worker, in this process and in several."""
