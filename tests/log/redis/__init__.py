"""Tests of `penstock.log.redis`."""
