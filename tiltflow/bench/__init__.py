"""The benchmarks: tables of methods."""
