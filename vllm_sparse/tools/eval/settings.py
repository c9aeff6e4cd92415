"""Setting: one choice of policies and sizes; those that are compared, and which of them one engine can run."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from vllm_sparse.config import SparseConfig
from vllm_sparse.errors import ConfigError
from vllm_sparse.policies import DECODE_POLICIES, POSITIONS, PREFILL_POLICIES, PRESETS
from vllm_sparse.tools import commands

COMMON = {"min_context_tokens": 0, "min_prefill_tokens": 1024, "head_patterns": "none"}
"""Fields of all settings unless ``--sparse`` says otherwise. With the defaults short contexts would run dense, and
a file of tuned patterns would stand in for the shares asked for."""
OWN = ("decode_policy", "budget_tokens", "prefill_policy", "prefill_top_p")
"""Keys that are what is compared."""


@dataclass(frozen=True)
class Setting:
    policy: str = "dense"
    budget: int | None = None
    """Tokens attended in a decode step; None where decode is dense."""
    prefill_policy: str = "dense"
    top_p: float | None = None
    """Share of the estimated attention that prefill keeps; None where its policy has none."""
    more: str | None = None
    """Further keys of this setting alone, such as ``offload``, as a JSON object with sorted keys."""

    @classmethod
    def of(cls, mapping: dict[str, Any], common: dict[str, Any]) -> Setting:
        """The setting that a mapping of sparse settings describes, beside those that all have in ``common``.

        A preset is what it sets: rows say what ran, whatever its name means later.
        """
        config = SparseConfig.from_mapping({**COMMON, **common, **mapping}, "--compare")
        # As in a grid, prefill is dense unless it is asked for.
        preset = PRESETS[config.preset] if "preset" in mapping else {}
        given = {"prefill_policy": "dense", **preset, **mapping}
        config = SparseConfig.from_mapping({**COMMON, **common, **given}, "--compare")
        decode, prefill = config.decode_policy, config.prefill_policy
        if decode == prefill == "dense":
            return cls()
        more = {key: value for key, value in given.items() if key not in (*OWN, "preset")}
        return cls(
            decode, None if decode == "dense" else config.budget_tokens,
            prefill, None if prefill == "dense" or prefill in POSITIONS else config.prefill_top_p,
            json.dumps(more, sort_keys=True) if more else None,
        )  # fmt: skip

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> Setting:
        more = row.get("more")
        return cls(
            row["policy"], row["budget"], row["prefill_policy"], row["top_p"],
            json.dumps(more, sort_keys=True) if more else None,
        )  # fmt: skip

    def columns(self) -> dict[str, Any]:
        """What a row says of its setting."""
        return {**vars(self), "more": json.loads(self.more) if self.more else None}

    @property
    def is_dense(self) -> bool:
        return self.policy == self.prefill_policy == "dense"

    def mapping(self, common: dict[str, Any]) -> dict[str, Any]:
        """The mapping that :meth:`SparseConfig.from_mapping` reads; ``common``: settings shared by all."""
        own = {"decode_policy": self.policy, "prefill_policy": self.prefill_policy}
        if self.budget is not None:
            own["budget_tokens"] = self.budget
        if self.top_p is not None:
            own["prefill_top_p"] = self.top_p
        return {**COMMON, **common, **json.loads(self.more or "{}"), **own}

    def offloads(self, common: dict[str, Any]) -> bool:
        return self.mapping(common).get("offload") is not None

    def describe(self) -> str:
        decode = self.policy if self.budget is None else f"{self.policy} {self.budget}"
        prefill = self.prefill_policy if self.top_p is None else f"{self.prefill_policy} {self.top_p:g}"
        parts = [decode] if self.prefill_policy == "dense" else [decode, f"prefill {prefill}"]
        more = json.loads(self.more or "{}").items()
        return ", ".join([*parts, *(f"{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in more)])


def parse(text: str) -> dict[str, Any]:
    """The type of ``--compare``: ``dense``, a preset, ``POLICY:BUDGET``, or a JSON object of sparse settings.

    Returns:
        The mapping, whose values are not checked yet.
    """
    if text.lstrip().startswith("{"):
        return commands.json_object(text)
    name, _, budget = text.partition(":")
    key = "preset" if name in PRESETS else "decode_policy"
    return {key: name, **({"budget_tokens": commands.whole(1)(budget)} if budget else {})}


def pair(mappings: list[dict[str, Any]], common: dict[str, Any]) -> list[Setting]:
    """The two settings of ``--compare``.

    Raises:
        ConfigError: one cannot be served, or both are the same.
    """
    _check_common(common)
    found = [Setting.of(mapping, common) for mapping in mappings]
    if found[0] == found[1]:
        raise ConfigError(f"--compare: {found[0].describe()} twice; allowed: two settings that differ")
    return found


def grid(
    policies: list[str],
    budgets: list[int],
    prefill_policies: list[str],
    top_ps: list[float],
    common: dict[str, Any],
) -> list[Setting]:
    """Dense first, then every decode and every prefill choice alone, and all pairs of them.

    Where ``common`` offloads there is no dense decode.

    Raises:
        ConfigError: a choice cannot be served, or none is sparse.
    """
    _check_common(common)
    decodes = [{}] + [
        {"policy": policy, "budget": budget} for policy in policies if policy != "dense" for budget in budgets
    ]
    prefills = [{}]
    for policy in prefill_policies:
        if policy == "dense":
            continue
        sized = policy not in POSITIONS
        prefills += [{"prefill_policy": policy, "top_p": c} for c in (top_ps if sized else [None])]
    # Each once, however often it was named.
    settings = list(dict.fromkeys(Setting(**decode, **prefill) for prefill in prefills for decode in decodes))
    if common.get("offload") is not None:
        settings = [setting for setting in settings if setting.policy != "dense"]
    for setting in settings:
        SparseConfig.from_mapping(setting.mapping(common), "--sparse")
    if all(setting.is_dense for setting in settings):
        raise ConfigError(
            f"--policies, --prefill-policies: only dense; allowed beside it: "
            f"{', '.join(name for name in DECODE_POLICIES if name != 'dense')} (decode), "
            f"{', '.join(name for name in PREFILL_POLICIES if name != 'dense')} (prefill)"
        )
    return settings


def _check_common(common: dict[str, Any]) -> None:
    for key in OWN:
        if key in common:
            raise ConfigError(f"--sparse: {key} is what is compared; allowed: the options for it, and other keys")


@dataclass(frozen=True)
class Group:
    """Settings that one engine can run."""

    start: Setting
    """The setting to start the engine with, so that it has room for all."""
    settings: tuple[Setting, ...]


def by_engine(settings: list[Setting], common: dict[str, Any]) -> list[Group]:
    """Groups that together hold all ``settings``: in each, pages store one kind of summary, which some policies
    do without, and further keys are the same. Dense attention, with which the others are compared, is in all that
    do not offload."""
    sparse = [setting for setting in settings if not setting.is_dense]
    dense = tuple(setting for setting in settings if setting.is_dense)
    groups = []
    for more in dict.fromkeys(setting.more for setting in sparse):
        mine = [setting for setting in sparse if setting.more == more]
        needed = dict.fromkeys(_summary(setting) for setting in mine)
        kinds = [kind for kind in needed if kind != "none"] or ["none"]
        for kind in kinds:
            # What needs no summary runs in the first engine.
            fitting = [s for s in mine if _summary(s) == kind or (kind == kinds[0] and _summary(s) == "none")]
            beside = () if fitting[0].offloads(common) else dense
            groups.append(Group(_widest(fitting, kind), (*beside, *fitting)))
    if dense and not any(dense[0] in group.settings for group in groups):
        # An engine that could run a sparse setting, all pages on the GPU.
        groups.insert(0, Group(replace(groups[0].start, more=None), dense))
    return groups


def _summary(setting: Setting) -> str:
    return DECODE_POLICIES[setting.policy].summary


def _widest(settings: list[Setting], summary: str) -> Setting:
    decode = [s for s in settings if s.policy != "dense"]
    # Of those whose pages hold most: without a summary slot there would be no place for one.
    fitting = [s for s in decode if _summary(s) == summary] or decode
    widest = next(iter(fitting), Setting(more=settings[0].more))
    prefill = next((s for s in settings if s.prefill_policy != "dense"), Setting())
    return Setting(
        widest.policy, max((s.budget for s in decode), default=None), prefill.prefill_policy, prefill.top_p,
        widest.more,
    )  # fmt: skip
