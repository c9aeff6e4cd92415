"""The one configuration object of vllm-sparse, and the only code that reads it.

Sources, the first one found wins:

1. ``--additional-config '{"sparse": {...}}'`` (``LLM(additional_config=...)``): picklable, part of
   vLLM's own config hash, and carried to every worker by vLLM.
2. ``VLLM_SPARSE_CONFIG``: the same object as JSON, or the path of a file that holds it.

Settings that stand elsewhere are refused (:mod:`vllm_sparse.misplaced`), never passed over.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from vllm_sparse import ENV_CONFIG, misplaced
from vllm_sparse.attention.registry import ATTENTION_KERNELS
from vllm_sparse.decode import budgets
from vllm_sparse.decode.budgets import BudgetTable
from vllm_sparse.errors import ConfigError, TableError, TextError
from vllm_sparse.offload.config import OffloadConfig, check_beside
from vllm_sparse.pages.head_patterns import HeadPattern, HeadPatterns
from vllm_sparse.pages.layout import PAGE_SIZES
from vllm_sparse.pages.selection import Selection
from vllm_sparse.policies import DECODE_POLICIES, PREFILL_POLICIES, PRESETS, PrefillPolicy, PrefillSizes
from vllm_sparse.prefill import patterns
from vllm_sparse.prefill.patterns import LEAST_TOP_P, PatternTable
from vllm_sparse.user_text import nearest, parse_json, read_file, shown

logger = logging.getLogger("vllm.vllm_sparse")

DEFAULT_PRESET = "balanced"
PATTERN_POLICY = "vertical_slash"
"""The prefill policy that reads ``head_patterns``."""
RESIDENT = {"dense_layers": 2, "min_context_tokens": 10240}
"""Defaults where all pages are on the GPU. Up to that context a request that is alone reads all of its pages in
less time than it takes to choose among them, in an fp8 cache."""
OFFLOADED = {"dense_layers": 0, "min_context_tokens": 4096}
"""Defaults with ``offload``, where what is attended densely is read from the host."""
TABLES = {"head_patterns": PatternTable, "head_budgets": BudgetTable}
"""Keys that name a file, which the driver reads; workers get what it holds."""
MOST = 2**31 - 1
"""Largest whole number of any key, and "always" or "never" where that is meant: kernels count in 32 bits."""


@dataclass(frozen=True)
class SparseConfig:
    """All that a user can choose. Token counts are per request and KV head."""

    preset: str = DEFAULT_PRESET
    """Settings in one word: a name of :data:`vllm_sparse.policies.registry.PRESETS`. Keys that are given win."""
    decode_policy: str | None = None
    """Choice of the pages that a decode step attends to: a name of :mod:`vllm_sparse.policies`. None: the
    preset's."""
    budget_tokens: int = 2048
    """Tokens attended in a decode step, sinks and window included; rounded down to whole pages."""
    head_budgets: str | BudgetTable = "none"
    """Shares of the budget for each KV head, 1 in the mean: ``none``, the same for all; a file of
    ``vllm-sparse tune --decode``; or ``auto``, the model's file if there is one."""
    top_p: float = 0.95
    """Share of the estimated attention at which a row of ``twilight`` ends before its budget."""
    sink_tokens: int = 16
    """First tokens of the context, always attended (rounded up to whole pages)."""
    window_tokens: int = 32
    """Most recent tokens, always attended (rounded up to whole pages)."""
    min_context_tokens: int | None = None
    """Up to this context length a request runs dense, which is exact. None: 10,240, or 4,096 with ``offload``."""
    dense_layers: int | None = None
    """Full-attention layers that run dense, the first ones: their attention is spread too widely to select. None:
    2, or 0 with ``offload``. Layers with windows or states do not count."""
    prefill_policy: str | None = None
    """Choice of the pages that a prefill chunk attends to: a name of :mod:`vllm_sparse.policies`. None: ``auto``,
    or ``dense`` where ``decode_policy`` is ``dense``."""
    min_prefill_tokens: int = 8192
    """Up to this context length a prefill chunk runs dense, which is exact; with ``auto`` up to ``budget_tokens``,
    too."""
    vertical_tokens: int = 1024
    """Tokens that a chunk keeps wherever the query is, in whole pages: columns or first tokens, by policy."""
    slash_tokens: int = 2048
    """Tokens that a chunk keeps by distance from the query: diagonals, in bands of a page, or recent tokens."""
    prefill_top_p: float = 0.98
    """Share of the estimated attention that policies which estimate keep; 0: the sizes above instead."""
    head_patterns: str | PatternTable = "auto"
    """Patterns of ``vertical_slash`` for each head: ``none``, a file of ``vllm-sparse tune``, or ``auto``, the
    model's file if there is one. Workers get the table itself, so that only the driver reads files."""
    recall_monitor_every_steps: int = 0
    """Decode steps between two in which a row's exact attention mass is measured, by the recall monitor
    (:mod:`vllm_sparse.decode.recall_monitor`); 0: never."""
    recall_monitor_layers: int = 4
    """Sparse layers of a rank that it measures, spread evenly; 0: all. Each costs every step a launch."""
    attention_kernel: str = "auto"
    """Attention kernel over chosen pages: ``auto`` or a name of :mod:`vllm_sparse.attention.registry`."""
    offload: OffloadConfig | None = None
    """Keep K and V in CPU memory, and on the GPU their summaries and a hot set; None: all on the GPU."""

    def __post_init__(self) -> None:
        _require_choice("preset", self.preset, PRESETS)
        defaults = (RESIDENT if self.offload is None else OFFLOADED) | PRESETS[self.preset]
        for key, value in defaults.items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)
        if self.prefill_policy is None:
            object.__setattr__(self, "prefill_policy", "dense" if self.decode_policy == "dense" else "auto")
        defaults["prefill_policy"] = "auto"
        for field in fields(self):
            if field.name == "offload":
                continue
            value, default = getattr(self, field.name), defaults.get(field.name, field.default)
            expected = type(default)
            if isinstance(value, TABLES.get(field.name, ())):
                continue
            if type(value) is not expected and not (expected is float and type(value) is int):
                raise ConfigError(
                    f"sparse.{field.name}: expected {_NAMES[expected]}, got {shown(value)}. "
                    f"Example: {json.dumps({field.name: default})}"
                )
        _require_choice("decode_policy", self.decode_policy, DECODE_POLICIES)
        _require_choice("prefill_policy", self.prefill_policy, PREFILL_POLICIES)
        _require_choice("attention_kernel", self.attention_kernel, ("auto", *ATTENTION_KERNELS))
        for name in (
            "sink_tokens", "window_tokens", "min_context_tokens", "dense_layers",
            "min_prefill_tokens", "vertical_tokens", "slash_tokens", "recall_monitor_every_steps",
            "recall_monitor_layers",
        ):  # fmt: skip
            if not 0 <= getattr(self, name) <= MOST:
                raise ConfigError(f"sparse.{name}: {shown(getattr(self, name))}; allowed: 0 or more, up to {MOST}")
        for name in TABLES:
            if isinstance(getattr(self, name), str) and not getattr(self, name).strip():
                raise ConfigError(f"sparse.{name}: {getattr(self, name)!r}; allowed: none, auto, or a file's path")
        if self.prefill_policy != PATTERN_POLICY and self.head_patterns not in ("auto", "none"):
            raise ConfigError(
                f"sparse.head_patterns: {_shown(self.head_patterns)} is for prefill_policy={PATTERN_POLICY!r} and "
                f"would not be read by {self.prefill_policy!r}; allowed with it: auto, none"
            )
        if not 1 <= self.budget_tokens <= MOST:
            raise ConfigError(
                f"sparse.budget_tokens: {shown(self.budget_tokens)}; allowed: at least one page, up to {MOST}"
            )
        if self.prefill_top_p != 0 and not LEAST_TOP_P <= self.prefill_top_p <= 1:
            raise ConfigError(
                f"sparse.prefill_top_p: {shown(self.prefill_top_p)}; allowed: 0 (fixed sizes) to 1, "
                f"from {LEAST_TOP_P}"
            )
        if self.recall_monitor_every_steps and self.decode_policy == "dense":
            raise ConfigError(
                f"sparse.recall_monitor_every_steps: {self.recall_monitor_every_steps} with "
                f"decode_policy='dense', which chooses no pages to measure; allowed with it: 0"
            )
        if not LEAST_TOP_P <= self.top_p <= 1:
            raise ConfigError(f"sparse.top_p: {shown(self.top_p)}; allowed: above 0, up to 1, from {LEAST_TOP_P}")
        if self.head_budgets != "none" and self._policy.adaptive:
            raise ConfigError(
                f"sparse.head_budgets: {_shown(self.head_budgets)} with decode_policy={self.decode_policy!r}, "
                f"whose rows end where top_p says; allowed with it: none"
            )
        if self.offload is not None:
            check_beside(self)
        # Whatever the page size, a smaller budget could not hold what is always attended.
        self.check_page_size(PAGE_SIZES[0])

    @classmethod
    def from_mapping(cls, values: Any, source: str) -> SparseConfig:
        """Check and build a config from a JSON object; ``source`` names it in errors."""
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: expected a JSON object of sparse settings, got {shown(values)}")
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                hint = misplaced.hint(key, source, KEYS) or nearest(key, known)
                raise ConfigError(f"{source}: unknown key {shown(key)}.{hint}")
        for key, table in TABLES.items():
            if isinstance(values.get(key), dict):
                try:
                    values = {**values, key: table.from_mapping(values[key])}
                except TableError as error:
                    raise ConfigError(f"{source}: sparse.{key}: the object given {error}") from None
        if values.get("offload") is not None:
            values = {**values, "offload": OffloadConfig.from_mapping(values["offload"], source, KEYS)}
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """This config as the plain JSON object that :meth:`from_mapping` reads."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for key, table in TABLES.items():
            if isinstance(values[key], table):
                values[key] = values[key].to_mapping()
        if self.offload is not None:
            values["offload"] = self.offload.to_mapping()
        return values

    @classmethod
    def from_vllm(cls, vllm_config: Any) -> SparseConfig:
        """The config of an engine: from its ``additional_config``, else from the environment.

        Raises:
            ConfigError: it cannot be served, or settings stand where nothing would read them.
        """
        additional = getattr(vllm_config, "additional_config", None) or {}
        if found := misplaced.find(additional, KEYS):
            raise ConfigError(" ".join(found))
        if isinstance(additional, dict) and "sparse" in additional:
            return cls.from_mapping(additional["sparse"], "additional_config['sparse']")
        return _from_text(os.environ.get(ENV_CONFIG, ""))

    def with_patterns(self, model: str, num_layers: int, q_heads: int) -> SparseConfig:
        """This config with the patterns that ``head_patterns`` names for a model, or with ``none``.

        Raises:
            ConfigError: the file is not one of this model.
        """
        asked = self.head_patterns
        if self.prefill_policy != PATTERN_POLICY or asked == "none" or isinstance(asked, PatternTable):
            return self
        path = _table_path(asked, patterns.default_path(model))
        if path is None:
            return replace(self, head_patterns="none")
        try:
            table = patterns.read(path, num_layers, q_heads, model)
        except TableError as error:
            raise _stale("head_patterns", asked, path, error, f"tune {model}") from None
        logger.info("sparse attention: prefill patterns for each head from %s", path)
        return replace(self, head_patterns=table)

    def with_budgets(self, model: str, num_layers: int, kv_heads: int) -> SparseConfig:
        """This config with the budgets that ``head_budgets`` names for a model, or with ``none``.

        Raises:
            ConfigError: the file is not one of this model.
        """
        asked = self.head_budgets
        if asked == "none" or isinstance(asked, BudgetTable):
            return self
        if self.decode_policy == "dense":
            logger.info("sparse attention: head_budgets is not read: decode_policy=dense attends to every page")
            return self
        path = _table_path(asked, default := budgets.default_path(model))
        if path is None:
            logger.info("sparse attention: the same decode budget for all heads: there is no %s", default)
            return replace(self, head_budgets="none")
        try:
            table = budgets.read(path, num_layers, kv_heads, model)
        except TableError as error:
            raise _stale("head_budgets", asked, path, error, f"tune {model} --decode") from None
        table = table.scaled(self.dense_layers)
        logger.info(
            "sparse attention: decode budgets for each head from %s, up to %.2f times", path, table.largest
        )
        return replace(self, head_budgets=table)

    @property
    def _policy(self):
        return DECODE_POLICIES[self.decode_policy]

    def with_offload(self, offload: OffloadConfig) -> SparseConfig:
        """This config with other settings of offload."""
        return replace(self, offload=offload)

    @property
    def uniform_pattern(self) -> HeadPattern:
        """The pattern of heads that have none of their own."""
        if self.prefill_top_p:
            return HeadPattern(top_p=float(self.prefill_top_p))
        return HeadPattern(self.vertical_tokens, self.slash_tokens)

    def prefill_sizes(self, page_size: int) -> PrefillSizes:
        """The settings that prefill policies read, with sinks in pages of ``page_size`` tokens."""
        return PrefillSizes(
            self.vertical_tokens, self.slash_tokens, self.prefill_top_p, self.sink_pages(page_size)
        )

    @property
    def least_auto_tokens(self) -> int:
        """Context tokens up to which ``auto`` leaves every chunk dense: a budget that covers them is exact."""
        return max(self.min_prefill_tokens, self.budget_tokens)

    def new_prefill_policy(self, page_size: int, patterns: HeadPatterns) -> PrefillPolicy:
        """The prefill policy of a layer whose query heads have ``patterns``."""
        return PREFILL_POLICIES[self.prefill_policy](self.prefill_sizes(page_size), page_size, patterns)

    def selection(self, page_size: int) -> Selection:
        """Budget, sinks, window and top_p of decode rows, without the budgets of a layer's own heads."""
        budget, largest = self.budget_pages(page_size), self.largest_pages(page_size)
        return Selection(
            page_size, budget, self.sink_pages(page_size), self.window_tokens,
            self.top_p if self._policy.adaptive else 0.0, largest if largest > budget else None,
        )  # fmt: skip

    def budget_pages(self, page_size: int) -> int:
        """``budget_tokens`` in whole pages, rounded down."""
        return self.budget_tokens // page_size

    def head_budget_pages(self, page_size: int, layer: int, rank: int, ranks: int, kv_heads: int) -> list[int]:
        """Budgets of a layer's KV heads on a tensor-parallel rank, where ``head_budgets`` is a table."""
        shares = self.head_budgets.of_layer(layer, rank, ranks, kv_heads)
        return [self._pages_of_share(share, page_size) for share in shares or (1.0,) * kv_heads]

    def _pages_of_share(self, share: float, page_size: int) -> int:
        pages = min(round(share * self.budget_pages(page_size)), MOST // page_size)
        return max(pages, self.least_pages(page_size))

    def largest_pages(self, page_size: int) -> int:
        """The largest budget of any head, for which tables are sized."""
        table = self.head_budgets
        share = table.largest if isinstance(table, BudgetTable) else 1.0
        return self._pages_of_share(share, page_size)

    def least_pages(self, page_size: int) -> int:
        """The smallest budget: sinks, window and one page to choose."""
        return Selection(page_size, 0, self.sink_pages(page_size), self.window_tokens).least_pages

    def sink_pages(self, page_size: int) -> int:
        """``sink_tokens`` in whole pages, rounded up."""
        return -(-self.sink_tokens // page_size)

    def table_pages(self, page_size: int) -> int:
        """Pages that a row of the decode page table has room for: a budget, or a whole short context."""
        return max(self.largest_pages(page_size), -(-self.min_context_tokens // page_size))

    def check_page_size(self, page_size: int) -> None:
        """Raise :class:`ConfigError` where pages of ``page_size`` tokens cannot serve this config."""
        if page_size not in PAGE_SIZES:
            raise ConfigError(
                f"--block-size: {page_size} is not a page size of the sparse backend; "
                f"allowed: {', '.join(map(str, PAGE_SIZES))}"
            )
        needed = self.least_pages(page_size) * page_size
        if self.budget_tokens < needed:
            raise ConfigError(
                f"sparse.budget_tokens: {self.budget_tokens} is too small for pages of {page_size} tokens: "
                f"sink_tokens={self.sink_tokens}, window_tokens={self.window_tokens} and one page to choose "
                f"need at least {needed}"
            )

    def check_drafts(self, query_tokens: int) -> None:
        """Raise :class:`ConfigError` where rows of ``query_tokens`` would not attend to all of them."""
        if self.window_tokens < query_tokens > 1:
            raise ConfigError(
                f"sparse.window_tokens: {self.window_tokens} tokens do not hold the {query_tokens - 1} drafts of "
                f"a request and the token before them; allowed: {query_tokens} or more"
            )


KEYS = misplaced.Keys(*(tuple(field.name for field in fields(kind)) for kind in (SparseConfig, OffloadConfig)))
_NAMES = {int: "a whole number", float: "a number", str: "a string"}


def _shown(value: Any) -> str:
    return shown(value) if isinstance(value, str) else "a table"


def _table_path(asked: str, default: Path) -> Path | None:
    """The file that a key of :data:`TABLES` names; None: ``auto``, and there is none."""
    if asked != "auto":
        return Path(os.path.expanduser(asked))
    return default if os.path.exists(default) else None  # os.path.exists takes a forbidden place for none


def _stale(key: str, asked: str, path: Path, error: TableError, command: str) -> ConfigError:
    return ConfigError(
        f"sparse.{key}: {asked!r}: {path} {error}. Allowed: auto, none, or a file that "
        f"`vllm-sparse {command} --out {path}` writes anew"
    )


def _require_choice(name: str, value: str, allowed) -> None:
    if value not in tuple(allowed):  # a list or an object could not be looked up in a dict
        raise ConfigError(f"sparse.{name}: unknown value {shown(value)}.{nearest(value, list(allowed))}")


def _from_text(text: str) -> SparseConfig:
    """Parse ``VLLM_SPARSE_CONFIG``: a JSON object, or the path of a file with one."""
    source: str = ENV_CONFIG
    written: str | bytes = text.strip().removeprefix("\ufeff")
    if not written:
        return SparseConfig()
    if not written.startswith("{"):
        path = os.path.expanduser(written)
        try:
            written = read_file(path)
        except TextError as error:
            raise ConfigError(
                f"{ENV_CONFIG}: {shown(text)} is neither a JSON object nor a readable file: it {error}"
            ) from None
        source = f"{ENV_CONFIG} (file {os.path.basename(path)})"
    try:
        values = parse_json(written)
    except TextError as error:
        raise ConfigError(f'{source}: {error}; write an object such as {{"budget_tokens": 2048}}') from None
    return SparseConfig.from_mapping(values, source)
