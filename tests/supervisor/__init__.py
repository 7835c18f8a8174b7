"""Tests of `penstock.supervisor`."""
