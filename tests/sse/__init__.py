"""Tests of `penstock.sse`."""
