"""What single requests ask for: a smaller decode budget, or exact attention.

Clients say it in ``vllm_xargs`` of the OpenAI API, or in ``SamplingParams.extra_args``:

* ``sparse_budget``: tokens attended in a decode step, in place of ``budget_tokens`` and at most that.
* ``sparse``: false for exact attention, in prefill and in decode.

It is checked where requests arrive (:func:`check`), and once more in the engine, for clients that pass by vLLM's
input processor. A worker keeps it by request (:class:`RequestBudgets`), and its runner says which request each row
of a step is of, and which rows are prompt tokens.

Requests that want exact attention get a cache salt of their own: K and V that an answer leaves in the prefix cache
come out of sparse steps, and so may those of a prompt. They share pages with each other, and with nobody else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from vllm.exceptions import VLLMValidationError

from vllm_sparse import support
from vllm_sparse.backend import compat, connectors
from vllm_sparse.config import SparseConfig
from vllm_sparse.pages.decode_plan import EXACT, takes_smaller_budgets
from vllm_sparse.pages.layout import PAGE_SIZES
from vllm_sparse.support import QUANTISED_CACHES
from vllm_sparse.user_text import nearest, shown

SPARSE, BUDGET = KEYS = ("sparse", "sparse_budget")
OWN_SALTS, EXACT_SALT, OTHER_SALT = "sparse-", "sparse-exact", "sparse-other"
"""How our salts of the prefix cache begin; that of exact requests; that of others whose own salts begin so."""


class RequestError(VLLMValidationError, ValueError):
    """A request that cannot be served as it asks; the message names key, value and what is allowed."""

    def __init__(self, key: Any, text: str):
        super().__init__(f"{key}: {text}", parameter=str(key))


def asked_tokens(extra_args: dict[str, Any] | None) -> int:
    """Budget that a request with these arguments asks for, ``EXACT``, or 0 where it asks for nothing.

    The OpenAI API makes numbers of booleans.
    """
    if not extra_args:
        return 0
    return extra_args.get(BUDGET, 0) if extra_args.get(SPARSE, True) else EXACT


def salt_of(own: str | None, exact: bool) -> str | None:
    """The salt under which the prefix cache keeps a request with the salt ``own``: exact requests share with no
    other ones, whatever salts these have."""
    if exact:
        return f"{EXACT_SALT}-{own or ''}"
    return f"{OTHER_SALT}-{own}" if own and own.startswith(OWN_SALTS) else own


def check(extra_args: dict[str, Any] | None, vllm_config: Any) -> None:
    """Check what a request asks for, of an engine with the sparse backend.

    Raises:
        RequestError: it cannot be served; names the key, its value and what is allowed.
    """
    asked = [key for key in extra_args or () if str(key).startswith(SPARSE)]
    if not asked:
        return
    for key in asked:
        if key not in KEYS:
            raise RequestError(shown(key), f"unknown key.{nearest(key, list(KEYS))}")
    config = SparseConfig.from_vllm(vllm_config)
    if SPARSE in asked:
        _check_sparse(extra_args[SPARSE], config, vllm_config)
    if BUDGET in asked:
        if not extra_args.get(SPARSE, True):
            raise RequestError(
                BUDGET, f"{shown(extra_args[BUDGET])} with sparse=false, which attends to every token; allowed: "
                f"one of the two"
            )  # fmt: skip
        _check_budget(extra_args[BUDGET], config, vllm_config)


def _check_sparse(value: Any, config: SparseConfig, vllm_config: Any) -> None:
    if type(value) not in (bool, int) or value not in (0, 1):
        raise RequestError(SPARSE, f"{shown(value)}; allowed: true, false")
    coded = config.offload is not None and config.offload.host_dtype == "fp8"
    if not value and coded and compat.kv_dtype(vllm_config) not in QUANTISED_CACHES:
        raise RequestError(
            SPARSE,
            "false with sparse.offload.host_dtype='fp8', where the host holds no exact K and V; allowed: true",
        )


def _check_budget(value: Any, config: SparseConfig, vllm_config: Any) -> None:
    why = _takes_no_budget(config, vllm_config)
    if why:
        raise RequestError(BUDGET, f"{shown(value)} to an engine {why}; allowed: none")
    page_size = page_size_of(vllm_config)
    least = config.least_pages(page_size) * page_size
    if type(value) is not int or not least <= value <= config.budget_tokens:
        raise RequestError(
            BUDGET, f"{shown(value)}; allowed: whole numbers of tokens from {least}, which hold "
            f"sink_tokens={config.sink_tokens}, window_tokens={config.window_tokens} and one page of {page_size} "
            f"tokens to choose, to {config.budget_tokens}, the budget_tokens of this engine"
        )  # fmt: skip


def _takes_no_budget(config: SparseConfig, vllm_config: Any) -> str:
    """Why requests to an engine may not ask for a budget; empty where they may."""
    model = vllm_config.model_config
    left = support.stock_model(config, model.is_encoder_decoder)
    if left:
        return f"whose layers all run as in stock vLLM ({left.reason})"
    if config.decode_policy == "dense":
        return "with sparse.decode_policy='dense', which reads none"
    page_size = page_size_of(vllm_config)
    if not takes_smaller_budgets(-(-model.max_model_len // page_size) + 1, config.largest_pages(page_size)):
        return f"with sparse.budget_tokens={config.budget_tokens}, which choose nothing of contexts this long"
    return ""


def page_size_of(vllm_config: Any) -> int:
    """Tokens of a page, of an engine that runs: only then does vLLM's config say it for certain."""
    hybrid = vllm_config.model_config.is_hybrid
    return PAGE_SIZES[0] if hybrid else vllm_config.cache_config.block_size or PAGE_SIZES[0]


class RequestBudgets:
    """What the requests of a worker ask for; shared by its layers."""

    def __init__(self) -> None:
        self._asked: dict[str, int] = {}
        self._row_ids: Sequence[str] = ()
        """Ids of the requests of a step while its metadata is built, in the order of its rows."""
        self._row_prompts: Any = None
        """Likewise, which rows are prompt tokens, where vLLM's metadata does not say so."""

    def note(self, scheduler_output: Any) -> None:
        """Take what new requests ask for, and forget those that have ended."""
        for request in scheduler_output.finished_req_ids:
            self._asked.pop(request, None)
        for new in scheduler_output.scheduled_new_reqs:
            tokens = asked_tokens(new.sampling_params.extra_args) if new.sampling_params else 0
            self._asked.pop(new.req_id, None)
            if tokens:
                self._asked[new.req_id] = tokens

    def of_rows(self) -> list[int]:
        """Tokens that each row of the step asks for, ``EXACT``, or 0; empty where none asks for anything."""
        if not self._asked:
            return []
        asked = [self._asked.get(request, 0) for request in self._row_ids]
        return asked if any(asked) else []

    def prompts(self, common: Any) -> np.ndarray | None:
        """Which rows of the step are prompt tokens: bool, perhaps without padding; None where that is not known.
        ``common``: vLLM's metadata of the step."""
        if self._row_prompts is not None:
            return self._row_prompts
        return None if common.is_prefilling is None else common.is_prefilling.numpy()

    def follow(self, runner: Any) -> None:
        """Keep up with the requests that ``runner`` serves, and with the rows of its steps."""
        execute, (owner, name, rows_of) = runner.execute_model, compat.metadata_call(runner)
        build = getattr(owner, name)

        @functools.wraps(execute)
        def execute_model(scheduler_output, *args, **kwargs):
            self.note(scheduler_output)
            return execute(scheduler_output, *args, **kwargs)

        @functools.wraps(build)
        def build_metadata(*args, **kwargs):
            self._row_ids, self._row_prompts = rows_of(*args, **kwargs)
            try:
                return build(*args, **kwargs)
            finally:
                self._row_ids, self._row_prompts = (), None

        runner.execute_model = execute_model
        setattr(owner, name, build_metadata)


def install() -> None:
    """Check requests where they arrive and in the engine, and keep exact ones apart in the prefix cache."""
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor

    def check_params(self, params, *args, **kwargs):
        if not compat.asks_for_sparse(self.vllm_config):
            return
        extra_args, transfer = getattr(params, "extra_args", None), self.vllm_config.kv_transfer_config
        check(extra_args, self.vllm_config)
        if transfer is not None and extra_args:
            connectors.check_peer(transfer.engine_id, extra_args.get("kv_transfer_params"))

    def prepare(self, request):
        if request.sampling_params is None or not compat.asks_for_sparse(self.vllm_config):
            return
        extra_args = request.sampling_params.extra_args
        check(extra_args, self.vllm_config)
        request.cache_salt = salt_of(request.cache_salt, exact=asked_tokens(extra_args) == EXACT)

    _before(InputProcessor, "_validate_params", check_params)
    _before(EngineCore, "preprocess_add_request", prepare)


def _before(cls: type, name: str, first: Callable) -> None:
    """Have ``first`` called with the arguments of a method, before it."""
    original = getattr(cls, name)

    @functools.wraps(original)
    def method(self, *args, **kwargs):
        first(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    setattr(cls, name, method)
