"""Runs under any ASGI server. The modules are imported one by one: this package imports none of them."""
