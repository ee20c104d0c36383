"""The command ``gqsa``, also where the extra that it needs is not installed."""

import sys

from vllm_gqsa.offline.errors import missing_extra

__all__ = ["main"]


def main() -> None:
    """Entry point of ``gqsa`` and of ``python -m vllm_gqsa.offline``."""
    try:
        from vllm_gqsa.offline.cli import main as run  # noqa: PLC0415 - may be impossible
    except ModuleNotFoundError as error:
        print(f"error: {missing_extra(error)}", file=sys.stderr)  # noqa: T201 - rich may be what is missing
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
