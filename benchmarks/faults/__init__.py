"""Faults under load: servers that are killed and restarted, and what readers saw of it."""
