"""The tests of penstock."""
