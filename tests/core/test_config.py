"""Settings check themselves, and name the key, what was found and what is allowed."""

from dataclasses import FrozenInstanceError, dataclass

import pytest

from retro_model.core.config import Config, setting
from retro_model.core.errors import ConfigError


@dataclass(frozen=True)
class ExampleConfig(Config, section="example"):
    rate: float = setting(3e-4, above=0.0)
    layers: tuple[int, ...] = setting((1,), minimum=1)
    name: str = setting("mean", choices=("mean", "cls"))
    limit: int | None = setting(None, minimum=1, maximum=10)
    fast: bool = False


WHOLE = {"rate": 0.1, "layers": [1, 2], "name": "cls", "limit": None, "fast": True}


def test_parse_gives_every_value_with_its_type() -> None:
    config = ExampleConfig.parse({**WHOLE, "rate": 1})
    assert config == ExampleConfig(1.0, (1, 2), "cls", None, True)
    assert isinstance(config.rate, float) and isinstance(config.layers, tuple)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": "fast"}, "example.rate: found 'fast', expected a number"),
        ({"rate": True}, "example.rate: found True, expected a number"),
        ({"rate": 0}, "example.rate: found 0.0, expected > 0.0"),
        ({"rate": float("nan")}, "example.rate: found nan, expected a finite number"),
        ({"rate": None}, "example.rate: found None, expected a number"),
        ({"layers": 3}, "example.layers: found 3, expected a list of a whole number"),
        ({"layers": [1, 0]}, "example.layers[1]: found 0, expected >= 1"),
        ({"layers": [1, 2.5]}, "example.layers[1]: found 2.5, expected a whole number"),
        ({"name": "max"}, "example.name: found 'max', expected one of mean, cls"),
        ({"limit": 11}, "example.limit: found 11, expected >= 1 and <= 10"),
        ({"limit": "x"}, "example.limit: found 'x', expected a whole number"),
        ({"fast": 1}, "example.fast: found 1, expected true or false"),
        ({"speed": 1}, "example.speed: unknown key; example has rate, layers, name, limit, fast"),
    ],
)
def test_a_wrong_value_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ExampleConfig.parse({**WHOLE, **change})
    assert str(caught.value) == message


@pytest.mark.parametrize("name", list(WHOLE))
def test_a_missing_key_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^example\.{name}: missing key; example needs rate, "):
        ExampleConfig.parse({key: value for key, value in WHOLE.items() if key != name})


def test_a_section_that_is_no_mapping_is_named() -> None:
    with pytest.raises(ConfigError, match="^example: found 3, expected a section of keys$"):
        ExampleConfig.parse(3)


def test_direct_construction_is_checked_too_and_nothing_changes_later() -> None:
    with pytest.raises(ConfigError, match=r"^example\.name: "):
        ExampleConfig(name="max")
    with pytest.raises(FrozenInstanceError):
        ExampleConfig().rate = 1.0  # type: ignore[misc]
