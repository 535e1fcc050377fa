"""Config: schemes, every validation error, ignore patterns, and the round trip through a dict."""

import dataclasses
import json

import pytest

from tqcompile.config import DEFAULT_IGNORE, LOW_BIT_METHODS, METHODS, SCHEMES, Config, Scheme, ignored_by, matches
from tqcompile.errors import ConfigError, TQError


def test_schemes_are_every_method_at_every_width():
    assert len(SCHEMES) == len(set(SCHEMES)) == 30
    for name in SCHEMES:
        scheme = Scheme.parse(name)
        assert scheme.name == name
        if scheme.weight_bits == 4:
            assert scheme.method in METHODS
            assert scheme.act_bits in (4, 8, 16)
        else:
            assert scheme.method in LOW_BIT_METHODS
            assert (scheme.weight_bits in (2, 3), scheme.act_bits) == (True, 16)


@pytest.mark.parametrize(
    "name",
    [
        *("twin", "twin-w4", "twin-w4a8 ", "Twin-w4a8", "twin-w3a8", "twin-w4a6", "awq-w4a8", "twin-w04a8"),
        *("twin-w\N{ARABIC-INDIC DIGIT FOUR}a8", "", None, 4, ["twin-w4a8"]),
    ],
)
def test_unknown_scheme_lists_the_known_ones(name):
    with pytest.raises(ConfigError) as caught:
        Scheme.parse(name)
    assert repr(name) in str(caught.value)
    assert all(known in str(caught.value) for known in SCHEMES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheme": "int4"}, "unknown scheme 'int4'"),
        ({"rank": 6}, "rank must be even and between 8 and 128, got 6"),
        ({"rank": 130}, "rank must be even and between 8 and 128, got 130"),
        ({"rank": 33}, "rank must be even and between 8 and 128, got 33"),
        ({"rank": 32.0}, "rank must be an integer, got 32.0"),
        ({"rank": True}, "rank must be an integer, got True"),
        ({"group_size": 0}, "group_size must be a positive multiple of 32, got 0"),
        ({"group_size": -64}, "group_size must be a positive multiple of 32, got -64"),
        ({"group_size": 100}, "group_size must be a positive multiple of 32, got 100"),
        ({"group_size": "128"}, "group_size must be an integer, got '128'"),
        ({"steps": -1}, "steps and tune must not be negative, got -1, "),
        ({"tune": -3}, "steps and tune must not be negative, got "),
        ({"tune": 2.0}, "tune must be an integer, got 2.0"),
        ({"samples": 0}, "samples must be positive"),
        ({"samples": None}, "samples must be an integer, got None"),
        ({"seq_len": 1}, "seq_len at least 2"),
        ({"seed": 0.5}, "seed must be an integer, got 0.5"),
        ({"ignore": "lm_head"}, "ignore must be a list of names"),
        ({"rotate_stream": 1}, "rotate_stream must be True or False"),
        ({"ignore": 3}, "ignore must be a list of names"),
        ({"ignore": None}, "ignore must be a list of names"),
        ({"ignore": [""]}, "non-empty strings, got ''"),
        ({"ignore": ["a", 3]}, "non-empty strings, got 3"),
        ({"ignore": ["re:(unclosed"]}, "'re:(unclosed' is not a regular expression"),
        ({"bits": 4}, "unknown setting 'bits'; known settings: scheme, rank, group_size"),
    ],
)
def test_every_refusal_names_the_setting(changes, message):
    with pytest.raises(ConfigError) as caught:
        Config().replace(**changes)
    assert message in str(caught.value)
    if "bits" not in changes:
        with pytest.raises(ConfigError):
            Config(**changes)


@pytest.mark.parametrize("rank", [8, 10, 128])
@pytest.mark.parametrize("group_size", [32, 96, 4096])
def test_limits_are_inclusive(rank, group_size):
    config = Config(rank=rank, group_size=group_size, samples=1, seq_len=2)
    assert (config.rank, config.group_size) == (rank, group_size)


def test_errors_are_ours_and_value_errors():
    assert issubclass(ConfigError, TQError)
    assert issubclass(ConfigError, ValueError)


def test_frozen_and_hashable():
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 16
    assert hash(config) == hash(Config())
    assert Config(ignore=["a", "b"]).ignore == ("a", "b")
    assert hash(Config(ignore=["a"])) == hash(Config(ignore=("a",)))
    assert Config().ignore == DEFAULT_IGNORE


def test_replace_leaves_the_original_alone():
    config = Config()
    assert config.replace(rank=16, seed=3) == Config(rank=16, seed=3)
    assert config == Config()


def test_round_trip_through_json():
    config = Config(
        scheme="svdquant-w4a4",
        rank=64,
        group_size=32,
        ignore=("re:.*down_proj", "layers.0"),
        samples=7,
        seq_len=64,
        seed=11,
        device="cuda:1",
    )
    data = json.loads(json.dumps(config.to_dict()))
    assert Config.from_dict(data) == config
    assert set(data) == {field.name for field in dataclasses.fields(Config)}
    with pytest.raises(ConfigError, match="unknown setting 'shape'"):
        Config.from_dict({**data, "shape": 1})


NAME = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (NAME, True),
        ("down_proj", True),
        ("model", True),
        ("layers.1", True),
        ("layers.1.mlp", True),
        ("mlp.down_proj", True),
        ("1", True),
        ("down", False),
        ("proj", False),
        ("layers.10", False),
        ("ayers.1", False),
        ("layers.mlp", False),
        ("layers..1", False),
        ("model.layers.1.mlp.down_proj.weight", False),
        ("layers.*", False),
        ("model-layers", False),
        ("re:.*down_proj", True),
        ("re:down_proj", False),
        (r"re:model\.layers\.\d\..*", True),
        (r"re:model\.layers\.\d", False),
        ("re:", False),
    ],
)
def test_a_name_matches_whole_dotted_parts_and_a_regular_expression_the_whole_name(pattern, expected):
    assert matches(pattern, NAME) is expected


def test_a_number_does_not_match_a_longer_number():
    assert not matches("layers.1", "model.layers.11.mlp")
    assert not matches("model.layers", "model_layers")


def test_the_first_pattern_wins():
    assert ignored_by(("lm_head", "mlp", "re:.*"), NAME) == "mlp"
    assert ignored_by(("lm_head",), NAME) is None
    assert ignored_by((), NAME) is None


def test_a_pattern_that_would_hang_is_refused():
    with pytest.raises(ConfigError, match=r"did not end within 1 s .* Write it without them"):
        matches("re:(a|aa)+$", "a" * 60 + "!")
