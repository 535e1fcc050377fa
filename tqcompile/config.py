"""Configuration: which scheme, at which rank and group size, on which layers."""

import dataclasses
import re
from collections.abc import Iterable, Mapping

from tqcompile.errors import ConfigError

METHODS = ("twin", "rtn", "gptq", "svdquant", "quarot", "spinquant")
LOW_BIT_METHODS = ("d2", "unisvq", "twin", "rtn", "gptq", "quarot")
DEFAULT_IGNORE = ("lm_head",)
OVERRIDABLE = ("scheme", "rank", "group_size")
MAX_SHARDS = 64
HEADS = ("keep", "w8a16", "w4a16")
PATTERN_SECONDS = 1.0  # a regular expression may take for one name
_SCHEME = re.compile(r"(?P<method>[a-z0-9]+)-w(?P<w>\d+)a(?P<a>\d+)")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A parsed scheme name. method: one of METHODS, or below four bits of LOW_BIT_METHODS; weight_bits: 2, 3 or 4;
    act_bits: 4, 8 or 16 (not quantized)."""

    method: str
    weight_bits: int
    act_bits: int

    @property
    def name(self) -> str:
        return f"{self.method}-w{self.weight_bits}a{self.act_bits}"

    @staticmethod
    def parse(name: str) -> "Scheme":
        """Parse ``<method>-w<bits>a<bits>``, e.g. ``twin-w4a8``. Raises ConfigError with the known names."""
        if isinstance(name, str) and name in SCHEMES:
            match = _SCHEME.fullmatch(name)
            return Scheme(match["method"], int(match["w"]), int(match["a"]))
        raise ConfigError(f"unknown scheme {name!r}; known schemes: {', '.join(SCHEMES)}")


FOUR_BIT_SCHEMES = tuple(f"{method}-w4a{bits}" for method in METHODS for bits in (4, 8, 16))
LOW_BIT_SCHEMES = tuple(f"{method}-w{bits}a16" for method in LOW_BIT_METHODS for bits in (3, 2))
SCHEMES = FOUR_BIT_SCHEMES + LOW_BIT_SCHEMES


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of :func:`tqcompile.compile`.

    scheme: ``<method>-w<weight bits>a<activation bits>``; the known names are ``tqcompile.SCHEMES``.
    rank: rank R of the low-rank component, even, 8 to 128 (twin and svdquant).
    group_size: weights that share one scale, along the input features.
    ignore: modules left alone. A plain name matches where its dotted parts occur in a module's name
        (``"lm_head"``, ``"layers.0"``, ``"model.layers.0.mlp.down_proj"``); ``"re:..."`` is a regular
        expression that must match the whole name. A pattern that matches nothing is an error.
    overrides: other settings for some layers: pattern (as in ``ignore``) -> some of OVERRIDABLE, or "keep" to leave the
        layer alone; the first pattern that matches a layer counts. Kept as (pattern, settings) pairs in that order.
    bits_budget: at most this many bits per weight on average, stored as the report counts them; weight bits, rank and
        group size (half, once or twice ``group_size``, in multiples of 64) of each site are then chosen from its
        measured effect on the model's output. The output head is not counted. None: ``scheme``, ``rank`` and
        ``group_size`` hold.
    steps: learning steps per site (twin and spinquant). 0 takes the closed-form transforms.
    tune: steps of block tuning after a block is quantized (twin; four times as many in d2 and unisvq). 0 leaves it out.
    samples: at most this many calibration sequences are used. seq_len: length of the windows that texts are cut to.
    shards: gradients of learning and of block tuning are formed in so many parts, added in one order, and as many
        processes can share the work (``torchrun``). Any number of processes gives the same result; with another value
        of ``shards`` it differs by rounding.
    seed: seeds every random choice (signs of the Hadamard rotation, sketches of large SVDs).
    rotate_stream: turn the residual stream by a random Hadamard matrix folded into the weights, where the graph proves
        that this changes nothing. Linears that read the stream then need no rotation of their own at run time.
    lm_head: what becomes of the output head: "keep" leaves it as it is, "w8a16" and "w4a16" round its weights to 8 or 4
        bits in groups of ``group_size``, activations stay as they are. A head that shares its weight with the
        embeddings gets a rounded copy of its own.
    device: where the numerics run, e.g. ``"cuda"``; None means where the model is.
    """

    scheme: str = "twin-w4a8"
    rank: int = 32
    group_size: int = 128
    ignore: tuple[str, ...] = DEFAULT_IGNORE
    overrides: tuple[tuple[str, tuple[tuple[str, str | int], ...] | str], ...] = ()
    bits_budget: float | None = None
    steps: int = 100
    tune: int = 30
    samples: int = 128
    seq_len: int = 512
    shards: int = 2
    seed: int = 0
    rotate_stream: bool = False
    lm_head: str = "keep"
    device: str | None = None

    def __post_init__(self):
        Scheme.parse(self.scheme)
        for field in ("rank", "group_size", "steps", "tune", "samples", "seq_len", "shards", "seed"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ConfigError(f"{field} must be an integer, got {value!r}")
        if not 8 <= self.rank <= 128 or self.rank % 2:
            raise ConfigError(f"rank must be even and between 8 and 128, got {self.rank}")
        if self.group_size < 32 or self.group_size % 32:
            raise ConfigError(f"group_size must be a positive multiple of 32, got {self.group_size}")
        if self.steps < 0 or self.tune < 0:
            raise ConfigError(f"steps and tune must not be negative, got {self.steps}, {self.tune}")
        if not 1 <= self.shards <= MAX_SHARDS:
            raise ConfigError(f"shards must be between 1 and {MAX_SHARDS}, got {self.shards}")
        if not isinstance(self.rotate_stream, bool):
            raise ConfigError(f"rotate_stream must be True or False, got {self.rotate_stream!r}")
        if self.lm_head not in HEADS:
            raise ConfigError(f"lm_head must be one of {', '.join(HEADS)}, got {self.lm_head!r}")
        if self.samples < 1 or self.seq_len < 2:
            raise ConfigError(f"samples must be positive and seq_len at least 2, got {self.samples}, {self.seq_len}")
        if isinstance(self.ignore, str) or not isinstance(self.ignore, Iterable):
            raise ConfigError(f"ignore must be a list of names or 're:' patterns, got {self.ignore!r}")
        object.__setattr__(self, "ignore", tuple(self.ignore))
        for pattern in self.ignore:
            _check_pattern(pattern, "ignore")
        object.__setattr__(self, "overrides", self._checked_overrides())
        budget = self.bits_budget
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int | float) or not budget > 0):
            raise ConfigError(f"bits_budget must be a positive number of bits per weight, got {budget!r}")

    def _checked_overrides(self) -> tuple:
        pairs = self.overrides.items() if isinstance(self.overrides, Mapping) else self.overrides
        example = "{'re:.*down_proj': {'rank': 64}, 'layers.0': 'keep'}"
        if isinstance(pairs, str) or not isinstance(pairs, Iterable):
            raise ConfigError(f"overrides must be like {example}, got {self.overrides!r}")
        checked = []
        for pair in pairs:
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise ConfigError(f"overrides must be like {example}, got {pair!r}")
            pattern, settings = pair
            _check_pattern(pattern, "overrides")
            if settings != "keep":
                try:
                    settings = dict(settings)
                except (TypeError, ValueError) as error:
                    what = f"overrides of {pattern!r} must be settings or 'keep', not {settings!r}"
                    raise ConfigError(what) from error
                if not settings or not set(settings) <= set(OVERRIDABLE):
                    known = ", ".join(OVERRIDABLE)
                    raise ConfigError(f"overrides of {pattern!r} may set {known}, got {settings!r}")
                try:
                    dataclasses.replace(self, overrides=(), bits_budget=None, **settings)
                except ConfigError as error:
                    raise ConfigError(f"overrides of {pattern!r}: {error}") from error
                settings = tuple(sorted(settings.items()))
            checked.append((pattern, settings))
        return tuple(checked)

    def override_of(self, name: str) -> tuple[str, dict[str, str | int] | str] | None:
        """The first pattern of ``overrides`` that matches a module's name, and its settings; or None."""
        for pattern, settings in self.overrides:
            if matches(pattern, name):
                return pattern, settings if settings == "keep" else dict(settings)
        return None

    def for_layer(self, name: str) -> "Config":
        """The settings of one linear: those of the model with its override; no overrides and no budget in them."""
        found = self.override_of(name)
        return self._variant({} if found is None or found[1] == "keep" else found[1])

    def variants(self) -> list["Config"]:
        """The settings of the model, and those of each override."""
        return [self._variant(dict(s)) for s in ((), *(s for _, s in self.overrides if s != "keep"))]

    def _variant(self, settings: dict) -> "Config":
        return dataclasses.replace(self, overrides=(), bits_budget=None, **settings)

    def replace(self, **changes) -> "Config":
        """A copy with some fields changed. Raises ConfigError on an unknown field."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise ConfigError(f"unknown setting {name!r}; known settings: {', '.join(known)}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict:
        # Pairs, not an object: JSON writers may sort the keys of an object, and the first pattern counts.
        overrides = [[pattern, s if s == "keep" else dict(s)] for pattern, s in self.overrides]
        return {**dataclasses.asdict(self), "ignore": list(self.ignore), "overrides": overrides}

    @staticmethod
    def from_dict(data: dict) -> "Config":
        return Config().replace(**data)


def read_overrides(texts: Iterable[str]) -> list[tuple[str, dict[str, str | int] | str]]:
    """``Config.overrides`` of texts like ``"down_proj scheme=twin-w3a16 rank=8"`` or ``"layers.0 keep"``.

    Raises:
        ConfigError: a text is not of this form.
    """
    found = []
    for text in texts:
        pattern, *words = text.split() or [""]
        pairs = [word.partition("=") for word in words]
        if words == ["keep"]:
            found.append((pattern, "keep"))
        elif not words or not all(name and sign and value for name, sign, value in pairs):
            raise ConfigError(f"override {text!r} must be 'PATTERN keep' or 'PATTERN name=value ...'")
        else:
            found.append((pattern, {name: int(v) if v.isascii() and v.isdigit() else v for name, _, v in pairs}))
    return found


def _check_pattern(pattern: object, setting: str) -> None:
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(f"{setting} patterns must be non-empty strings, got {pattern!r}")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ConfigError(f"{setting} pattern {pattern!r} is not a regular expression: {error}") from error


def matches(pattern: str, name: str) -> bool:
    """Whether a module name is matched by a pattern (see Config.ignore)."""
    if pattern.startswith("re:"):
        import regex

        try:
            return regex.fullmatch(pattern[3:], name, timeout=PATTERN_SECONDS) is not None
        except TimeoutError as error:
            raise ConfigError(
                f"pattern {pattern!r} did not end within {PATTERN_SECONDS:g} s on {name!r}: repetitions inside "
                "repetitions. Write it without them."
            ) from error
    return f".{pattern}." in f".{name}."


def ignored_by(patterns: Iterable[str], name: str) -> str | None:
    """The first pattern that matches ``name``, or None."""
    return next((pattern for pattern in patterns if matches(pattern, name)), None)
