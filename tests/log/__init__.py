"""Tests of `penstock.log`."""
