"""Tests of the tools: benchmarks, fault tools, and the servers that tests start."""
