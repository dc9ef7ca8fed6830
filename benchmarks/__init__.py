"""Benchmarks: each module but `runner`, `data`, `floors`, `loaders` and `peer_loaders` offers ``run(size) -> dict``."""
