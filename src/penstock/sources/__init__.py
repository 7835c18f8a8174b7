"""Tools for producers: `command`, `keepalive` and `cancel_when`, each in the module of its name."""
