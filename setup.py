"""Which folders are which packages; everything else about the distribution is in pyproject.toml.

``offline/`` lies at the top of the repository and installs as ``vllm_gqsa.offline``. Listing its subpackages needs
a line of code, which pyproject.toml cannot hold.

An editable install (``pip install -e .``) maps both folders through the import hook that setuptools makes for such
layouts, so Python and pytest see every change at once. mypy knows no import hooks: ``make types`` shows it the same
tree through symbolic links in build/types. A link committed as vllm_gqsa/offline would serve both, but breaks on
file systems and archives without links.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["vllm_gqsa", "vllm_gqsa.*"]),
        "vllm_gqsa.offline",
        *(f"vllm_gqsa.offline.{name}" for name in find_packages("offline")),
    ],
    package_dir={"vllm_gqsa": "vllm_gqsa", "vllm_gqsa.offline": "offline"},
    package_data={"vllm_gqsa": ["py.typed"], "vllm_gqsa.offline": ["py.typed"]},
)
