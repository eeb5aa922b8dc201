"""Base class of the frozen config dataclasses, which validate their fields.

Each component's config is defined in the module that uses it:

    @dataclass(frozen=True)
    class IndexConfig(Config, section="index"):
        target_recall: float = setting(0.95, above=0.0, maximum=1.0)

Every construction checks type, range and choices. The error names the dotted key, the value found and the
allowed values. `Config.parse` builds a config from a mapping such as a section of params.yaml and requires
every key, so that the file lists every setting in use.
"""

import math
import operator
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from retro_model.core.errors import ConfigError

ConfigType = TypeVar("ConfigType", bound="Config")


def setting(
    default: Any = MISSING,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[Any, ...] | None = None,
) -> Any:
    """Return a dataclass field whose value must lie in the given range or be one of `choices`."""
    limits = {"minimum": minimum, "maximum": maximum, "above": above, "below": below, "choices": choices}
    return field(default=default, metadata={name: limit for name, limit in limits.items() if limit is not None})


def optional_path(key: str, value: str) -> Path | None:
    """Return the path of an optional input; None for an empty string or an empty folder (hidden files are ignored).

    params.yaml sets an unused input to an empty folder: every input must be declared as a dependency for DVC to
    notice changes, and DVC does not accept an empty path as a dependency.

    Raises ConfigError, with the dotted key, if the path does not exist.
    """
    path = Path(value)
    if not value or (path.is_dir() and all(file.name.startswith(".") for file in path.iterdir())):
        return None
    if not path.exists():
        raise ConfigError(f"{key}: found {value!r}, expected a path that is there, or an empty folder for none")
    return path


@dataclass(frozen=True)
class Config:
    """Base of all configs; `section` is the prefix of the dotted keys in error messages."""

    section: ClassVar[str] = ""

    def __init_subclass__(cls, section: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.section = section

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in fields(self):
            key = self.dotted(item.name)
            value = _coerce(getattr(self, item.name), hints[item.name], key)
            object.__setattr__(self, item.name, value)  # a list becomes a tuple, 1 becomes 1.0
            _check_range(value, item.metadata, key)

    @classmethod
    def dotted(cls, name: str) -> str:
        """Return the dotted name of a field, as in params.yaml."""
        return f"{cls.section}.{name}" if cls.section else name

    @classmethod
    def parse(cls: type[ConfigType], mapping: object) -> ConfigType:
        """Build the config from `mapping`; raises ConfigError for a missing or an unknown key."""
        where = cls.section or "params"
        if not isinstance(mapping, Mapping):
            raise ConfigError(f"{where}: found {_show(mapping)}, expected a section of keys")
        names = [item.name for item in fields(cls)]
        for name in mapping:
            if name not in names:
                raise ConfigError(f"{cls.dotted(str(name))}: unknown key; {where} has {', '.join(names)}")
        for name in names:
            if name not in mapping:
                raise ConfigError(f"{cls.dotted(name)}: missing key; {where} needs {', '.join(names)}")
        return cls(**mapping)


def _coerce(value: Any, hint: Any, key: str) -> Any:
    """Convert `value` to the type `hint` if that loses nothing; raises ConfigError otherwise."""
    if hint is Any:
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = [argument for argument in arguments if argument is not type(None)]
        return _coerce(value, hint, key)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{key}: found {_show(value)}, expected a list of {_name(arguments[0])}")
        return tuple(_coerce(item, arguments[0], f"{key}[{place}]") for place, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{key}: found {_show(value)}, expected {_name(hint)}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{key}: found {value}, expected a finite number")
    return value


def _check_range(value: Any, limits: Mapping[str, Any], key: str) -> None:
    if value is None:
        return
    if isinstance(value, tuple):
        for place, item in enumerate(value):
            _check_range(item, limits, f"{key}[{place}]")
        return
    if "choices" in limits and value not in limits["choices"]:
        raise ConfigError(f"{key}: found {_show(value)}, expected one of {', '.join(map(str, limits['choices']))}")
    bounds = (
        ("minimum", ">=", operator.ge),
        ("above", ">", operator.gt),
        ("maximum", "<=", operator.le),
        ("below", "<", operator.lt),
    )
    given = [(sign, holds, limits[name]) for name, sign, holds in bounds if name in limits]
    if not all(holds(value, limit) for _, holds, limit in given):
        allowed = " and ".join(f"{sign} {limit}" for sign, _, limit in given)
        raise ConfigError(f"{key}: found {value}, expected {allowed}")


def _name(hint: Any) -> str:
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(hint, str(hint))


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
