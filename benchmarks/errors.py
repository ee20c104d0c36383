"""The one error of the benchmarks."""


class BenchmarkError(Exception):
    """Why a measurement cannot go on, in one sentence a person can act on."""
