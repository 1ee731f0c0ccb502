"""The embedded default: a small world of seven emotions as real clips, text about them, and offline judges."""
