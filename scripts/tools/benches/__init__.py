"""What scripts/tools/bench.py measures, a module each: `measure(options) -> Iterator[dict]`."""
