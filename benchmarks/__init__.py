"""Benchmarks: each module but `runner`, `data`, `floors` and `loaders` offers ``run(size) -> dict``."""
