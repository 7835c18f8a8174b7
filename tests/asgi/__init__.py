"""Tests of `penstock.asgi`."""
