"""Tests of `penstock.cli`."""
