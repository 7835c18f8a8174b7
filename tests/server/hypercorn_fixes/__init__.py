"""Tests of `penstock.server.hypercorn_fixes`."""
