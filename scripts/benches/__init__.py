"""What scripts/bench.py measures, a module each: `measure(options) -> Iterator[dict]`."""
