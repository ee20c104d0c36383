"""The ``quantization_config`` of a checkpoint's config.json."""

import functools
import re
from collections.abc import Mapping
from typing import Any, Literal

import re2
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vllm_gqsa.format.errors import FormatError
from vllm_gqsa.format.matrix import GROUP_SIZES

__all__ = [
    "EMBEDDING",
    "FORMAT_VERSION",
    "FUSED",
    "HEAD",
    "GqsaConfig",
    "ModuleEntry",
    "check_fused",
    "check_ignore",
    "is_ignored",
    "parse_pattern",
]

FORMAT_VERSION = 1
HEAD = "lm_head"
"""Last part of the name of an output head."""
EMBEDDING = "embed_tokens"
"""Last part of the name of an input embedding. Listed in ``modules``, it is tied to the head: its one matrix
``[vocabulary, hidden]`` serves both, and the head is neither listed nor ignored."""
FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
}
"""What a serving engine joins into one layer, by last parts of names. It also stacks the experts of a mixture."""


class ModuleEntry(BaseModel):
    """What is known of one compressed linear before its data is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    nnz: int = Field(ge=0, strict=True)
    """Number of kept groups."""
    group_size: int | None = Field(default=None, strict=True)
    """G of this linear where it differs from the others'."""

    @field_validator("group_size")
    @classmethod
    def _known_group_size(cls, value: int | None) -> int:
        return _known_group_size(value)


class GqsaConfig(BaseModel):
    """``quantization_config`` of format version 1; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    quant_method: Literal["gqsa"] = "gqsa"
    format_version: Literal[1] = 1
    bits: Literal[4] = 4
    group_size: int = Field(strict=True)
    """G, input features a group, of every linear that has none of its own in ``modules``."""
    sparsity: float = Field(ge=0, lt=1)
    """Share of groups that was asked to be pruned; the exact counts are in ``modules``."""
    pattern: str
    """Scope the mask was chosen in: ``row``, ``matrix``, ``model`` or ``n:m``. A hint: any valid mask is accepted."""
    ignore: tuple[str, ...] = ()
    """Modules left dense: exact names, or ``re:`` and a regular expression (of RE2) that matches from the start."""
    modules: dict[str, ModuleEntry]
    """Every compressed linear by its unfused Hugging Face name; also the embedding that is tied to the head."""

    @property
    def head(self) -> str | None:
        """Name in ``modules`` of the head's matrix, its own or the embedding's; None where the head is dense."""
        return next((name for name in self.modules if name.rpartition(".")[2] in (EMBEDDING, HEAD)), None)

    def group_size_of(self, name: str) -> int:
        """G of a compressed linear.

        Args:
            name: listed in ``modules``.
        """
        return self.modules[name].group_size or self.group_size

    @property
    def group_sizes(self) -> list[int]:
        """The group sizes of all compressed linears, each once, smallest first."""
        return sorted({self.group_size_of(name) for name in self.modules})

    @field_validator("group_size")
    @classmethod
    def _known_group_size(cls, value: int) -> int:
        return _known_group_size(value)

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, value: str) -> str:
        if value not in ("row", "matrix", "model"):
            parse_pattern(value)
        return value

    @field_validator("ignore")
    @classmethod
    def _regular_expressions_compile(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        check_ignore(value)
        return value

    @classmethod
    def parse(cls, raw: Any, where: str) -> "GqsaConfig":  # noqa: ANN401 - anything can stand in a JSON file
        """Read a ``quantization_config``.

        Args:
            raw: the decoded JSON value.
            where: the file it came from, put in front of the message.

        Raises:
            FormatError: one sentence with the first key at fault, its value and what is allowed.
        """
        if not isinstance(raw, dict):
            raise FormatError(f"{where}: quantization_config is {type(raw).__name__}, expected an object")
        version = raw.get("format_version")
        if raw.get("quant_method") == "gqsa" and version != FORMAT_VERSION:
            raise FormatError(
                f"{where}: format_version {version!r} is unknown, this vllm-gqsa reads {FORMAT_VERSION}; "
                "install the version of vllm-gqsa that wrote the checkpoint, or a newer one"
            )
        try:
            config = cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in first["loc"])
            value = "" if first["type"] in ("missing", "extra_forbidden") else f" (found {first['input']!r})"
            raise FormatError(f"{where}: quantization_config.{key}: {first['msg']}{value}") from error
        try:
            check_fused({name: config.group_size_of(name) for name in config.modules})
        except ValueError as error:
            raise FormatError(f"{where}: quantization_config.modules: {error}") from error
        return config

    def to_json(self) -> dict[str, Any]:
        """The value to write into config.json, keys in the order of the format's documentation."""
        return self.model_dump(mode="json", exclude_none=True)


def _known_group_size(value: int | None) -> int:
    if value not in GROUP_SIZES:
        raise ValueError(f"must be one of {', '.join(map(str, GROUP_SIZES))}")
    return value


def check_fused(sizes: Mapping[str, int]) -> None:
    """Check that linears which are served as one layer have the same group size.

    Args:
        sizes: group size of every compressed linear by its unfused Hugging Face name.

    Raises:
        ValueError: two of them differ; the message names both.
    """
    layers: dict[tuple[str, str], str] = {}
    for name, size in sizes.items():
        parent, _, last = re.sub(r"\.experts\.[0-9]+\.", ".experts.", name).rpartition(".")
        fused = next((layer for layer, parts in FUSED.items() if last in parts), last)
        first = layers.setdefault((parent, fused), name)
        if sizes[first] != size:
            raise ValueError(
                f"{first} has groups of {sizes[first]}, {name} of {size}; they are served as one fused layer, so give "
                "them the same group_size"
            )


def parse_pattern(pattern: str) -> tuple[int, int]:
    """Read an ``n:m`` pattern: n of every m adjacent groups are kept.

    Raises:
        ValueError: not of that form, or not 0 < n <= m.
    """
    match = re.fullmatch(r"([0-9]{1,3}):([0-9]{1,3})", pattern)
    if match is None or not 0 < int(match[1]) <= int(match[2]):
        raise ValueError(f"pattern {pattern!r} is neither 'row', 'matrix', 'model' nor 'n:m' with 0 < n <= m")
    return int(match[1]), int(match[2])


def check_ignore(ignore: tuple[str, ...]) -> None:
    """Check that the ``re:`` entries of an ignore list compile.

    Raises:
        ValueError: one does not; the message begins with ``ignore`` and the entry.
    """
    for entry in ignore:
        if entry.startswith("re:"):
            _compiled(entry)


def is_ignored(name: str, ignore: tuple[str, ...]) -> bool:
    """Whether a module name is on an ignore list of exact names and ``re:`` expressions."""
    return any(_compiled(e).match(name) is not None if e.startswith("re:") else e == name for e in ignore)


@functools.lru_cache(maxsize=256)
def _compiled(entry: str) -> Any:  # noqa: ANN401 - re2 has no types
    # RE2 and not re: checkpoints come from strangers, and a hostile expression can keep re busy for years.
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(entry[3:], options)
    except (re2.error, UnicodeEncodeError) as error:
        reason = error.args[0].decode(errors="replace") if isinstance(error, re2.error) else "not Unicode text"
        raise ValueError(f"ignore {entry!r} is not a regular expression that RE2 knows: {reason}") from error
