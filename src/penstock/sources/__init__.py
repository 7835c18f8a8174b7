"""Tools for those who write producers: `command`, `keepalive`, `cancel_when`, each in the module of its name."""
