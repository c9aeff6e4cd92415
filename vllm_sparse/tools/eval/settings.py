"""Setting: one choice of policies and sizes, and the grid of those that are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_sparse.config import SparseConfig
from vllm_sparse.errors import ConfigError
from vllm_sparse.policies import DECODE_POLICIES, POSITIONS, PREFILL_POLICIES

COMMON = {"min_context_tokens": 0, "min_prefill_tokens": 1024, "head_patterns": "none"}
"""Fields of all settings unless ``--sparse`` says otherwise. With the defaults short contexts would run dense, and
a file of tuned patterns would stand in for the shares asked for."""


@dataclass(frozen=True)
class Setting:
    policy: str = "dense"
    budget: int | None = None
    """Tokens attended in a decode step; None where decode is dense."""
    prefill_policy: str = "dense"
    top_p: float | None = None
    """Share of the estimated attention that prefill keeps; None where its policy has none."""

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
        return {**COMMON, **common, **own}

    def describe(self) -> str:
        decode = self.policy if self.budget is None else f"{self.policy} {self.budget}"
        prefill = self.prefill_policy if self.top_p is None else f"{self.prefill_policy} {self.top_p:g}"
        return decode if self.prefill_policy == "dense" else f"{decode}, prefill {prefill}"


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
    own = ("decode_policy", "budget_tokens", "prefill_policy", "prefill_top_p")
    for key in own:
        if key in common:
            raise ConfigError(f"--sparse: {key} is what is compared; allowed: the options for it, and other keys")
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


def by_summary(settings: list[Setting]) -> dict[str, list[Setting]]:
    """Settings that one engine can run: pages store one kind of summary, which some policies do without."""
    needed = list(dict.fromkeys(DECODE_POLICIES[setting.policy].summary for setting in settings))
    kinds = [kind for kind in needed if kind != "none"] or ["none"]
    groups: dict[str, list[Setting]] = {kind: [] for kind in kinds}
    for setting in settings:
        kind = DECODE_POLICIES[setting.policy].summary
        if setting.is_dense:
            for group in groups.values():
                group.append(setting)
        else:
            groups[kind if kind in groups else kinds[0]].append(setting)
    return groups
