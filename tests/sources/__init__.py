"""Tests of `penstock.sources`."""
