"""The one error of the CPU benchmarks."""


class BenchmarkError(Exception):
    """Why a measurement cannot go on, in one sentence a person can act on."""
