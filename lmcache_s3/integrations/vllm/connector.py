"""`LMCacheS3Connector`: the plugin vLLM loads by configuration. Thin: it checks the start, picks the role, and guards.

Contract: vLLM 0.32 `KVConnectorBase_V1`. Loads are asynchronous and reported through `get_transfer_results`; stores are
copied out in `wait_for_save`; nothing here waits for the network. Whatever goes wrong behind a hook is counted, logged
once, and answered so that the engine computes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_pp_group, get_tp_group

from lmcache_s3.config import load_settings
from lmcache_s3.errors import Invalid, LMCacheS3Error
from lmcache_s3.integrations.vllm.metadata import StepOrders, WorkerReport
from lmcache_s3.integrations.vllm.model import Unsupported, describe
from lmcache_s3.integrations.vllm.opening import Opening, check_start
from lmcache_s3.integrations.vllm.scheduler import SchedulerRole
from lmcache_s3.integrations.vllm.stats import ConnectorPromMetrics, ConnectorStats
from lmcache_s3.integrations.vllm.worker import WorkerRole

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger("lmcache_s3.vllm")

_Hook = TypeVar("_Hook", bound=Callable[..., Any])
_WORKER_DRAIN_S, _SCHEDULER_DRAIN_S = 1.5, 2.0
"""vLLM ends the workers, then the scheduler, and kills what is left 5 s after it asked. Uploads were drained before,
while the engine kept stepping (`has_pending_push_work`); this is for the last commits."""


def _guarded(default: Callable[[LMCacheS3Connector], Any]) -> Callable[[_Hook], _Hook]:
    """An error inside a hook must not reach the engine: count it, log it once a hook, answer `default`."""

    def wrap(hook: _Hook) -> _Hook:
        @functools.wraps(hook)
        def guarded(self: LMCacheS3Connector, *args: Any, **kwargs: Any) -> Any:
            try:
                return hook(self, *args, **kwargs)
            except Exception as error:  # noqa: BLE001 - the engine calls us here: it computes instead
                self._count_error(hook.__name__, error)
                return default(self)

        return cast(_Hook, guarded)

    return wrap


def _share_engine_log() -> None:
    """Our lines go where vLLM's go (it configures its own loggers only)."""
    ours, engine = logging.getLogger("lmcache_s3"), logging.getLogger("vllm")
    if not ours.handlers and engine.handlers:
        ours.handlers = list(engine.handlers)
        ours.setLevel(engine.level)
        ours.propagate = False


def _check_failure_policy(own: KVTransferConfig) -> None:
    """vLLM's default fails a request whose load failed. Inside MultiConnector the scheduler obeys the top level's."""
    top = get_current_vllm_config_or_none()
    for transfer in (own, top.kv_transfer_config if top is not None else None):
        if transfer is not None and transfer.kv_load_failure_policy != "recompute":
            raise Invalid(
                f"kv_load_failure_policy: '{transfer.kv_load_failure_policy}' would fail requests whenever the store "
                'does; write "kv_load_failure_policy":"recompute" in --kv-transfer-config (with MultiConnector: at the '
                "top and at this connector)",
                kind="setting",
                key="kv_load_failure_policy",
            )


class LMCacheS3Connector(KVConnectorBase_V1, SupportsHMA):
    """One engine process's end of the cache: the scheduler role or a worker role.

    Raises `Invalid` or `Unsafe` at start for settings, credentials or stores that the user must mend; models that are
    not supported yet only turn it off, with one line in the log.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._scheduler: SchedulerRole | None = None
        self._worker: WorkerRole | None = None
        self._said: set[str] = set()
        _share_engine_log()
        transfer = self._kv_transfer_config
        _check_failure_policy(transfer)
        settings = load_settings(**transfer.kv_connector_extra_config)
        codec = settings.make_codec()
        try:
            facts = describe(vllm_config, kv_cache_config, settings)
        except Unsupported as reason:
            logger.warning("LMCache-S3 is off: %s", reason)
            return
        if role is KVConnectorRole.SCHEDULER:
            opening = Opening(facts, settings, codec)
            opening.start()
            self._scheduler = SchedulerRole(facts, settings, codec, opening)
        else:
            check_start(settings)
            self._worker = WorkerRole(
                facts,
                settings,
                codec,
                attention_layers=vllm_config.compilation_config.static_forward_context,
                tensor_rank=get_tp_group().rank_in_group,
                stage=get_pp_group().rank_in_group,
                replica=vllm_config.parallel_config.data_parallel_rank,
            )

    def _count_error(self, hook: str, error: Exception) -> None:
        counters = self._scheduler.counters if self._scheduler else self._worker.counters if self._worker else None
        if counters is not None:
            counters.add(internal_errors=1)
        if hook not in self._said:
            self._said.add(hook)
            logger.error("%s failed, the engine computes instead (said once): %r", hook, error, exc_info=error)

    @property
    def requires_kv_delivery(self) -> bool:
        """A dropped store is only a later miss."""
        return False

    # ---- worker ----------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self._worker is None:
            return
        try:
            self._worker.register(kv_caches)
        except (Unsupported, LMCacheS3Error) as reason:
            self._worker.turn_off(str(reason))
        except Exception as error:  # noqa: BLE001 - an attention backend is asked, and may say anything
            self._count_error("register_kv_caches", error)
            self._worker.turn_off(f"the engine's blocks could not be learnt: {error!r}")

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        orders = self._connector_metadata
        if self._worker is None or not isinstance(orders, StepOrders):
            return
        try:
            self._worker.start_loads(orders)
        except Exception as error:  # noqa: BLE001 - the requests below wait for us: fail them, the engine computes
            self._count_error("start_load_kv", error)
            self._worker.fail_loads(orders)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are asynchronous: a request is scheduled when its load is whole."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Chunks are copied whole, after the forward, in `wait_for_save`."""

    @_guarded(lambda self: None)
    def wait_for_save(self) -> None:
        orders = self._connector_metadata
        if self._worker is not None and isinstance(orders, StepOrders):
            self._worker.gather(orders)

    @_guarded(lambda self: KVConnectorTransferResults())
    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        if self._worker is None:
            return KVConnectorTransferResults()
        done, failed = self._worker.take_finished()
        return KVConnectorTransferResults(finished_recving=done, failed_recving=failed)

    @_guarded(lambda self: None)
    def build_connector_worker_meta(self) -> WorkerReport | None:
        return self._worker.take_report() if self._worker is not None else None

    # ---- scheduler -------------------------------------------------------------------------------------------------

    @_guarded(lambda self: None)
    def on_new_request(self, request: Request) -> None:
        if self._scheduler is not None:
            self._scheduler.arrived(request)

    @_guarded(lambda self: (0, False))
    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        tokens = self._scheduler.match(request, num_computed_tokens) if self._scheduler is not None else 0
        return tokens, tokens > 0

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        if self._scheduler is None:
            return
        try:
            self._scheduler.allocated(request, blocks, num_external_tokens)
        except Exception as error:  # noqa: BLE001 - the request already waits for a load: fail it, the engine computes
            self._count_error("update_state_after_alloc", error)
            if num_external_tokens:
                self._scheduler.fail_load(request.request_id)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        if self._scheduler is None:
            return StepOrders()
        try:
            return self._scheduler.orders(scheduler_output)
        except Exception as error:  # noqa: BLE001 - loads not sent must fail, else their requests wait for ever
            self._count_error("build_connector_meta", error)
            return self._scheduler.failed_orders()

    @_guarded(lambda self: None)
    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        if self._scheduler is not None:
            self._scheduler.reported(connector_output)

    @_guarded(lambda self: (False, None))
    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    @_guarded(lambda self: (False, None))
    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Full chunks were copied as they filled: the blocks are free at once."""
        if self._scheduler is not None:
            self._scheduler.finished(request)
        return False, None

    @_guarded(lambda self: False)
    def has_pending_push_work(self) -> bool:
        return self._scheduler is not None and self._scheduler.busy()

    @_guarded(lambda self: False)
    def reset_cache(self) -> bool | None:
        if self._scheduler is not None:
            self._scheduler.reset()
        return True

    # ---- both ------------------------------------------------------------------------------------------------------

    @_guarded(lambda self: None)
    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        fresh: dict[str, float] = {}
        if self._scheduler is not None:
            self._scheduler.write_stats()
            fresh = self._scheduler.counters.take()
        elif self._worker is not None:
            fresh = self._worker.counters.take()
        return ConnectorStats(data=fresh) if fresh else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return ConnectorStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> ConnectorPromMetrics:
        return ConnectorPromMetrics(*args)

    @_guarded(lambda self: None)
    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close(_WORKER_DRAIN_S)
        if self._scheduler is not None:
            self._scheduler.close(_SCHEDULER_DRAIN_S)
