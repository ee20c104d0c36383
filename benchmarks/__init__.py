"""Scripts that measure or show something, and their results; not installed."""
