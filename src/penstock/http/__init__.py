"""penstock over HTTP."""
