"""Tests of `penstock.observer`."""
