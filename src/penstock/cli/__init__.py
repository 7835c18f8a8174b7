"""The program `penstock`."""
