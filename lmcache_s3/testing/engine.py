"""A real vLLM engine in a process of its own, driven over pipes: what the demo, the benchmarks and the tests ask.

`EngineProcess` starts `lmcache_s3.testing.engine_worker`, which builds vLLM's `LLMEngine` (with the connector, by its
published configuration alone) and answers JSON lines. The two talk over stdin and stdout; vLLM's own words go to
`log_path`.
Invariant: no process outlives its owner. The worker is the leader of a process group that `close` and `kill` end, and
it ends that group itself when its stdin closes, as it does when the owner dies in whatever way.
Raises `EngineFailed`, with the end of the log, and nothing else of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lmcache_s3.errors import LMCacheS3Error

MODULE_PATH = "lmcache_s3.integrations.vllm"
Prompt = str | Sequence[int]


class EngineFailed(LMCacheS3Error):
    """The engine did not start, died, or answered an error. The message ends with the end of its log."""

    default_kind = "engine"


@dataclass(frozen=True, slots=True)
class Answer:
    """One finished request.

    tokens: generated token ids. ttft_s: from handing the request to the engine until its first token came back.
    cached_tokens: vLLM's `num_cached_tokens`. logprobs: for each generated token the asked number of best
    (token id, log-probability), best first; empty if none were asked for.
    """

    prompt_tokens: int
    tokens: tuple[int, ...]
    text: str
    ttft_s: float
    total_s: float
    cached_tokens: int
    finish_reason: str
    logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()


def kv_transfer_config(url: str, extra_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The engine's `--kv-transfer-config` as a user would write it."""
    return {
        "kv_connector": "LMCacheS3Connector",
        "kv_connector_module_path": MODULE_PATH,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"url": url, **(extra_config or {})},
    }


class EngineProcess:
    """vLLM in its own process group. Used by one thread.

    url: where the cache lives; None with `connector=False`. env: added to this process's environment.
    hash_seed: the engine's PYTHONHASHSEED. engine_args: further arguments of vLLM's `EngineArgs`, e.g.
    `{"tensor_parallel_size": 2}`; a `kv_transfer_config` there replaces ours. kv_space_gib: memory for the engine's
    own KV. The constructor returns at once; `ready` waits until the engine serves (about 25 s), `ask` does so too.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        url: str | None = None,
        connector: bool = True,
        extra_config: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        hash_seed: int = 0,
        max_model_len: int = 8192,
        kv_space_gib: int = 1,
        block_size: int = 128,
        dtype: str = "bfloat16",
        prefix_caching: bool = True,
        engine_args: Mapping[str, Any] | None = None,
        directory: str | Path | None = None,
        name: str = "engine",
        audit: bool = False,
    ) -> None:
        if connector and url is None:
            raise EngineFailed("an engine with the connector needs a url")
        self._tmp = None if directory else tempfile.TemporaryDirectory(prefix="lmcache-s3-engine-")
        home = Path(directory or self._tmp.name)  # type: ignore[union-attr]
        home.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.log_path = home / f"{name}.log"
        self.stats_path = home / f"{name}.stats"
        self.audit_path = home / f"{name}.audit"
        for stale in (*home.glob(f"{name}.stats.*"), self.audit_path):
            stale.unlink(missing_ok=True)  # they would be taken for this engine's
        args: dict[str, Any] = {
            "model": str(model),
            "dtype": dtype,
            "max_model_len": max_model_len,
            "block_size": block_size,
            "enforce_eager": True,
            "enable_prefix_caching": prefix_caching,
            "disable_log_stats": False,
            "max_num_seqs": 16,
            "seed": 0,
        }
        if connector and url is not None:
            args["kv_transfer_config"] = kv_transfer_config(url, extra_config)
        args.update(engine_args or {})
        environment = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": str(kv_space_gib),
            # One core is left to the server, the scheduler and I/O, with a connector as without one: vLLM itself leaves
            # a connector's engine two, or none where there are but two, and then no two engines compute alike.
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "LMCACHE_S3_STATS_FILE": str(self.stats_path),
            **({"LMCACHE_S3_AUDIT_FILE": str(self.audit_path)} if audit else {}),
            **(env or {}),
            "PYTHONHASHSEED": str(hash_seed),
        }
        self._started_s = time.monotonic()
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lmcache_s3.testing.engine_worker", json.dumps(args)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,  # its own group: ended whole, and not by the terminal's Ctrl-C
            )
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._is_ready = False
        threading.Thread(target=self._read, name=f"{name}-answers", daemon=True).start()

    # -- life ---------------------------------------------------------------------------------------------------
    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ready(self, timeout_s: float = 300.0, *, tick: Callable[[float], None] | None = None) -> Self:
        """Wait until the engine serves. `tick` is called about five times a second with the seconds since start."""
        if not self._is_ready:
            self._receive(timeout_s, "start", tick)
            self._is_ready = True
        return self

    def close(self, timeout_s: float = 30.0) -> None:
        """Shut down in good order (pending stores drain), then make sure that the whole group is gone."""
        if self.is_alive and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)
        self.kill()

    def kill(self) -> None:
        """End the whole group now, as a crash would."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        if self._tmp is not None:
            self._tmp.cleanup()
            self._tmp = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is None:
            self.close()
        else:
            self.kill()

    # -- asking -------------------------------------------------------------------------------------------------
    def ask(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_tokens: int = 16,
        *,
        logprobs: int | None = None,
        together: bool = False,
        cache_salt: str | None = None,
        lora: tuple[str, int, str] | None = None,
        ignore_eos: bool = False,
        timeout_s: float = 600.0,
        tick: Callable[[float], None] | None = None,
    ) -> list[Answer]:
        """Greedy answers to prompts (texts or token ids), one after another, or all at once with `together`.

        lora: (name, number, directory). tick: as for `ready`, with the seconds since this call.
        """
        self.ready()
        reply = self._call(
            {
                "op": "ask",
                "prompts": [p if isinstance(p, str) else [int(t) for t in p] for p in _as_list(prompts)],
                "max_tokens": max_tokens,
                "logprobs": logprobs,
                "together": together,
                "cache_salt": cache_salt,
                "lora": lora,
                "ignore_eos": ignore_eos,
            },
            timeout_s,
            tick,
        )
        return [_answer(a) for a in reply["answers"]]

    def encode(self, text: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a text, or of chat messages with the model's chat template and a generation prompt."""
        self.ready()
        payload = text if isinstance(text, str) else [dict(m) for m in text]
        ids: list[int] = self._call({"op": "encode", "text": payload}, 60.0)["ids"]
        return ids

    def warm_up(
        self,
        prompt: Prompt,
        *,
        until: Callable[[dict[str, dict[str, float]]], bool] = lambda stats: bool(stats["scheduler"].get("ready")),
        timeout_s: float = 60.0,
        tick: Callable[[float], None] | None = None,
    ) -> None:
        """Ask a short prompt, once and then until the connector's counters say so (default: its index is open).

        An idle engine takes no steps, and counters are written with steps: waiting alone would not show them. The
        question is for log-probabilities, too: vLLM compiles that the first time, which takes seconds.
        """
        start_s = time.monotonic()
        while True:
            self.ask(prompt, 1, logprobs=2, tick=tick)
            if until(now := self.stats()):
                return
            if time.monotonic() - start_s > timeout_s:
                raise EngineFailed(f"{self.name} was not ready in {timeout_s:.0f} s: {now}\n{self.log_tail()}")
            time.sleep(0.2)

    def reset_prefix_cache(self) -> None:
        """Forget the engine's own prefix cache (the connector's state stays)."""
        self.ready()
        self._call({"op": "reset_prefix_cache"}, 60.0)

    # -- watching -----------------------------------------------------------------------------------------------
    def stats(self) -> dict[str, dict[str, float]]:
        """The connector's counters by role (`scheduler`, `worker`), summed over ranks; empty before the first."""
        out: dict[str, dict[str, float]] = {"scheduler": {}, "worker": {}}
        for path in self.stats_path.parent.glob(f"{self.stats_path.name}.*"):
            if path.name.endswith(".tmp"):
                continue
            with contextlib.suppress(FileNotFoundError):
                values = json.loads(path.read_text())
                role = out.setdefault(str(values.get("role", "worker")), {})
                for key, value in values.items():
                    if isinstance(value, int | float) and key != "rank":  # a truth value counts the ranks it is true of
                        role[key] = role.get(key, 0) + value
        return out

    def stat(self, role: str, key: str) -> float:
        return self.stats().get(role, {}).get(key, 0)

    def wait_stats(
        self,
        condition: Callable[[dict[str, dict[str, float]]], bool],
        timeout_s: float = 60.0,
        *,
        what: str = "the expected counters",
        tick: Callable[[float], None] | None = None,
    ) -> dict[str, dict[str, float]]:
        """Wait until `condition(stats())` holds, and return those stats."""
        start_s = time.monotonic()
        while not condition(now := self.stats()):
            waited_s = time.monotonic() - start_s
            if not self.is_alive:
                raise EngineFailed(f"{self.name} died while waiting for {what}\n{self.log_tail()}")
            if waited_s > timeout_s:
                raise EngineFailed(f"{self.name}: {what} did not come in {timeout_s:.0f} s; counters: {now}")
            if tick is not None:
                tick(waited_s)
            time.sleep(0.1)
        return now

    def audit(self) -> list[dict[str, str]]:
        """Lines of the audit file: op, hash, shard, xxh3."""
        if not self.audit_path.exists():
            return []
        return [json.loads(line) for line in self.audit_path.read_text().splitlines() if line]

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def log_tail(self, lines: int = 30) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    # -- pipes --------------------------------------------------------------------------------------------------
    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError, OSError):  # closed by kill()
            for line in self._process.stdout:
                self._lines.put(json.loads(line))
        self._lines.put(None)

    def _call(
        self, request: Mapping[str, Any], timeout_s: float, tick: Callable[[float], None] | None = None
    ) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as e:
            raise EngineFailed(f"{self.name} is gone\n{self.log_tail()}") from e
        return self._receive(timeout_s, str(request["op"]), tick)

    def _receive(self, timeout_s: float, what: str, tick: Callable[[float], None] | None) -> dict[str, Any]:
        start_s = time.monotonic()
        base_s = self._started_s if what == "start" else start_s
        while True:
            try:
                reply = self._lines.get(timeout=0.2)
            except queue.Empty:
                if tick is not None:
                    tick(time.monotonic() - base_s)
                if time.monotonic() - start_s <= timeout_s:
                    continue
                raise EngineFailed(
                    f"{self.name}: no answer to {what} in {timeout_s:.0f} s\n{self.log_tail()}"
                ) from None
            if reply is None:
                raise EngineFailed(f"{self.name} died during {what}\n{self.log_tail()}")
            if "error" in reply:
                raise EngineFailed(f"{self.name}: {what} failed: {reply['error']}\n{self.log_tail()}")
            return reply


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    first: object = next(iter(prompts), None)
    if isinstance(first, str | Iterable):
        return list(prompts)  # type: ignore[arg-type]
    return [prompts]  # type: ignore[list-item]


def _answer(a: Mapping[str, Any]) -> Answer:
    return Answer(
        prompt_tokens=a["prompt_tokens"],
        tokens=tuple(a["tokens"]),
        text=a["text"],
        ttft_s=a["ttft_s"],
        total_s=a["total_s"],
        cached_tokens=a["cached_tokens"],
        finish_reason=a["finish_reason"],
        logprobs=tuple(tuple((int(t), float(p)) for t, p in step) for step in a["logprobs"]),
    )
