"""Benchmarks: ratios within one run, medians over interleaved rounds, equal results asserted first."""
