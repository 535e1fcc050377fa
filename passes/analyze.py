"""Analyze: a model, one example and a Config in, a Plan out; the model is left as it was.

Every linear of the model ends up in exactly one site, or among the skipped with a reason. A site has an
absorber only if all its linears are quantized and, where the absorber is a linear, that one too. The residual
stream is a matter of the model alone: what is ignored is not quantized, but a rotation turns it with the rest.
"""

import difflib
from collections import Counter
from collections.abc import Mapping

import torch
import torch.fx
from torch import nn

from tqcompile.config import DEFAULT_IGNORE, Config, Scheme, ignored_by, matches
from tqcompile.errors import ConfigError, PassError
from tqcompile.passes.base import run_passes
from tqcompile.passes.capture import capture
from tqcompile.passes.find_absorbers import FindAbsorbers
from tqcompile.passes.find_linears import FindLinears, is_linear
from tqcompile.passes.find_residual_stream import FindResidualStream
from tqcompile.passes.graph import kind
from tqcompile.passes.group_shared_inputs import GroupSharedInputs
from tqcompile.passes.plan import Absorber, Plan, Site

PASSES = (FindLinears, GroupSharedInputs, FindAbsorbers, FindResidualStream)


def analyze(model: nn.Module, example: Mapping, config: Config) -> Plan:
    """Find what to quantize in ``model``, and how its parts hang together.

    Raises:
        ConfigError: an ignore pattern matches no module, or an override no linear that it could change.
        PassError: an analysis pass failed on a graph that was captured.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    experts = _expert_parameters(modules)
    _check_patterns(config.ignore, [*modules, *experts])
    _check_overrides(config, [name for name, module in modules.items() if isinstance(module, nn.Linear)])
    linears = [name for name, module in modules.items() if type(module) is nn.Linear]
    skipped = {**_skip_modules(model, modules, config), **experts}
    for name in dict.fromkeys([*linears, *skipped]):
        pattern = ignored_by(config.ignore, name)
        override = config.override_of(name)
        if override is not None and override[1] == "keep":
            skipped[name] = f"kept by the override {override[0]!r}"
        if pattern:
            skipped[name] = f"ignored by {pattern!r}"
    try:
        gm = capture(model, example)
    except PassError as error:
        sites = tuple(Site((name,), None, "no graph") for name in linears if name not in skipped)
        note = f"{error}; every linear is its own site and no scale is absorbed"
        return Plan(sites, skipped, (note,), None, "no graph")
    run_passes(gm, [make() for make in PASSES])
    for name, reason in _skip_by_graph(gm, modules).items():
        skipped.setdefault(name, reason)
    notes = ()
    if gm.meta["unnamed_linears"]:
        notes = (f"left as they are, made by no named module: {', '.join(gm.meta['unnamed_linears'])}",)
    stream = gm.meta["find_residual_stream"]
    found, reason = (None, stream) if isinstance(stream, str) else (stream, "")
    return Plan(_sites(gm, _shared_parameters(model), config, skipped), skipped, notes, found, reason)


def _check_patterns(patterns: tuple[str, ...], names: list[str]) -> None:
    parts = {part for name in names for part in name.split(".")}
    for pattern in patterns:
        if pattern not in DEFAULT_IGNORE and not any(matches(pattern, name) for name in names if name):
            close = difflib.get_close_matches(pattern.removeprefix("re:"), [*names, *sorted(parts)], n=4, cutoff=0.5)
            hint = f"; close names: {', '.join(close)}" if close else f"; names look like {', '.join(names[-3:])}"
            raise ConfigError(f"ignore pattern {pattern!r} matches no module of the model{hint}")


def _check_overrides(config: Config, linears: list[str]) -> None:
    """Every override must count for at least one linear."""
    counting = {config.override_of(name)[0] for name in linears if config.override_of(name)}
    effective = {p for p in counting if any(not ignored_by(config.ignore, n) for n in linears if matches(p, n))}
    for pattern, settings in config.overrides:
        names = [name for name in linears if matches(pattern, name)]
        if not names:
            close = difflib.get_close_matches(pattern.removeprefix("re:"), linears, n=3, cutoff=0.4)
            hint = f"; linear layers are named like {', '.join(close or linears[-3:])}"
            raise ConfigError(f"overrides pattern {pattern!r} matches no linear layer of the model{hint}")
        if pattern not in counting:
            raise ConfigError(
                f"overrides pattern {pattern!r} never counts: earlier patterns match all of its layers ({names[0]}, "
                "...). Put it first, or remove it"
            )
        if settings != "keep" and pattern not in effective:
            raise ConfigError(
                f"overrides pattern {pattern!r} matches only layers in ignore ({names[0]}, ...). Remove one of them; "
                "the output head has a setting of its own, lm_head"
            )


def _expert_parameters(modules: dict[str, nn.Module]) -> dict[str, str]:
    """Stacks of expert matrices (experts, out, in) or (experts, in, out), by parameter name."""
    found = {}
    for name, module in modules.items():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and min(parameter.shape) > 1 and parameter.is_floating_point():
                found[f"{name}.{leaf}".lstrip(".")] = (
                    f"fused expert parameter of shape {tuple(parameter.shape)}: "
                    "quantization of 3-D expert weights is not supported"
                )
    return found


def _shared_parameters(model: nn.Module) -> dict[str, str]:
    """Parameter name -> another name of the same parameter, where there is one."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return {name: next(n for n in names if n != name) for names in owners.values() if len(names) > 1 for name in names}


def _skip_modules(model: nn.Module, modules: dict[str, nn.Module], config: Config) -> dict[str, str]:
    """Reasons that need no graph, for linears and what does the work of one."""
    shared, skipped = _shared_parameters(model), {}
    for name, module in modules.items():
        if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            skipped[name] = "Conv1D stores its weight transposed: only torch.nn.Linear can be quantized"
        elif isinstance(module, nn.Linear):
            reason = _refuse(name, module, shared, config.for_layer(name))
            if reason:
                skipped[name] = reason
    return skipped


def _refuse(name: str, module: nn.Linear, shared: dict, config: Config) -> str | None:
    n, k, weight = module.out_features, module.in_features, module._parameters.get("weight")
    tied = shared.get(f"{name}.weight")
    if type(module) is not nn.Linear:
        return f"{type(module).__module__}.{type(module).__qualname__} is not exactly torch.nn.Linear"
    if weight is None or not weight.is_floating_point():
        return "its weight is not a floating-point parameter (computed, or already quantized)"
    if tied:
        return f"its weight is tied to {tied}"
    if k % config.group_size:
        return f"in_features {k} is not divisible by group_size {config.group_size}"
    if Scheme.parse(config.scheme).method in ("twin", "svdquant") and config.rank >= min(n, k):
        return f"rank {config.rank} is not below min(out_features {n}, in_features {k})"
    return None


def _skip_by_graph(gm: torch.fx.GraphModule, modules: dict[str, nn.Module]) -> dict[str, str]:
    """Reasons that only the graph shows: how often a linear is called, and who else reads its weight."""
    found, skipped = gm.meta["find_linears"], {}
    reads = Counter(name for group in gm.meta["group_shared_inputs"].values() for name in group)
    for name, module in modules.items():
        if type(module) is nn.Linear and name not in reads:
            skipped[name] = "not reached by the example input"
    for name, count in reads.items():
        if type(modules.get(name)) is not nn.Linear:
            what = type(modules[name]).__name__ if name in modules else "no module of the model"
            skipped[name] = f"a linear computed by {what}, not by a torch.nn.Linear"
        elif count > 1:
            skipped[name] = f"called on {count} different inputs (module reuse)"
    for node in gm.graph.nodes:
        if node.name in found:
            weight = node.args[1]
            while kind(weight) == "same":
                weight = weight.args[0]
            other = next((user for user in weight.users if not _reads_weight_of(user, found, found[node.name])), None)
            if other is not None:
                skipped.setdefault(found[node.name], f"its weight is also read by node {other.name}")
    return skipped


def _reads_weight_of(user: torch.fx.Node, found: dict[str, str], name: str) -> bool:
    if kind(user) in ("same", "silent"):
        return all(_reads_weight_of(reader, found, name) for reader in user.users)
    return is_linear(user) and found.get(user.name) == name


def _sites(gm: torch.fx.GraphModule, shared: dict, config: Config, skipped: dict[str, str]) -> tuple[Site, ...]:
    sites = []
    for node, group in gm.meta["group_shared_inputs"].items():
        absorber = gm.meta["find_absorbers"][node]
        reason = absorber if isinstance(absorber, str) else _veto(absorber, group, shared, config, skipped)
        # Linears with other settings need a transform of their own: they are a site of their own.
        parts: dict[Config, list[str]] = {}
        for name in group:
            if name not in skipped:
                parts.setdefault(config.for_layer(name), []).append(name)
        for part in parts.values():
            why = reason or (_other_settings(config, part, parts) if len(parts) > 1 else "")
            sites.append(Site(tuple(part), None if why else absorber, why))
    return tuple(sites)


def _other_settings(config: Config, part: list[str], parts: dict[Config, list[str]]) -> str:
    """Why a scale is not absorbed where overrides split the readers of one input."""
    other = next(names[0] for names in parts.values() if names is not part)
    pattern = next(found[0] for found in map(config.override_of, (other, part[0])) if found)
    return f"{other} reads the same input with other settings (override {pattern!r})"


def _veto(absorber: Absorber, group: list[str], shared: dict, config: Config, skipped: dict[str, str]) -> str:
    """Why an absorber that the graph allows is not used; "" if it is."""
    left = next((name for name in group if name in skipped), None)
    if left is not None:
        return f"{left} reads the same input and is not quantized ({skipped[left]})"
    if absorber.kind != "norm" and absorber.module in skipped:
        return f"{absorber.module} could absorb but is not quantized ({skipped[absorber.module]})"
    for parameter in (f"{absorber.module}.weight", f"{absorber.module}.bias"):
        if parameter in shared:
            return f"{parameter} is tied to {shared[parameter]}"
    pattern = ignored_by(config.ignore, absorber.module)
    return f"{absorber.module} is ignored by {pattern!r}" if pattern else ""
