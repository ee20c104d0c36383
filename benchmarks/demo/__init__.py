"""`make setup` and `make demo`."""
