"""The one error of the demo."""


class DemoError(Exception):
    """Why the demo cannot go on, in one sentence a person can act on."""
