"""The process behind `EngineProcess`: builds vLLM's engine, reads JSON lines from stdin, writes answers to stdout.

    python -m lmcache_s3.testing.engine_worker '{"model": …, …}'       arguments of vLLM's EngineArgs

First line out: `{"ready": true}` or `{"error": …}`. Then one line out for each line in. When stdin closes, the engine
is shut down in good order, at most `_DRAIN_S` long; then the process group, whose leader this is, ends.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import IO, Any

_DRAIN_S = 15.0


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints goes to the log
    requests: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_read_stdin, args=(requests,), daemon=True).start()
    try:
        engine = _Engine(json.loads(sys.argv[1]))
    except Exception as e:
        _say(answers, {"error": _one_line(e)})
        raise
    _say(answers, {"ready": True})
    while (request := requests.get()) is not None:
        try:
            _say(answers, engine.do(request))
        except Exception as e:
            _say(answers, {"error": _one_line(e)})
            raise
    engine.shutdown()


def _say(answers: IO[str], reply: Mapping[str, Any]) -> None:
    answers.write(json.dumps(reply) + "\n")
    answers.flush()


def _one_line(e: BaseException) -> str:
    return f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"


def _read_stdin(requests: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    """Until stdin closes: then the owner is done with us, or dead."""
    for line in sys.stdin:
        requests.put(json.loads(line))
    requests.put(None)
    if os.getpgrp() == os.getpid():
        time.sleep(_DRAIN_S)
        os.killpg(os.getpid(), signal.SIGKILL)


class _Engine:
    def __init__(self, args: dict[str, Any]) -> None:
        from vllm.config import KVTransferConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        if isinstance(args.get("kv_transfer_config"), dict):
            args["kv_transfer_config"] = KVTransferConfig(**args["kv_transfer_config"])
        self._engine = LLMEngine.from_engine_args(EngineArgs(**args))
        self._asked = 0

    def do(self, request: Mapping[str, Any]) -> dict[str, Any]:
        op = request["op"]
        if op == "ask":
            return {"answers": self._ask(request)}
        if op == "encode":
            return {"ids": self._encode(request["text"])}
        if op == "reset_prefix_cache":
            return {"done": bool(self._engine.reset_prefix_cache())}
        raise ValueError(f"unknown op {op!r}")

    def shutdown(self) -> None:
        self._engine.engine_core.shutdown()

    def _encode(self, text: str | list[dict[str, str]]) -> list[int]:
        tokenizer = self._engine.get_tokenizer()
        if isinstance(text, str):
            return [int(t) for t in tokenizer.encode(text)]
        rendered = tokenizer.apply_chat_template(text, add_generation_prompt=True, tokenize=False)
        return [int(t) for t in tokenizer.encode(rendered, add_special_tokens=False)]

    def _ask(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        prompts = request["prompts"]
        if request["together"]:
            return self._run(prompts, request)
        return [answer for prompt in prompts for answer in self._run([prompt], request)]

    def _run(self, prompts: list[Any], request: Mapping[str, Any]) -> list[dict[str, Any]]:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0,
            max_tokens=request["max_tokens"],
            logprobs=request["logprobs"],
            ignore_eos=request["ignore_eos"],
        )
        order: list[str] = []
        start_s: dict[str, float] = {}
        first_s: dict[str, float] = {}
        done: dict[str, dict[str, Any]] = {}
        for prompt in prompts:
            self._asked += 1
            rid = f"ask-{self._asked}"
            order.append(rid)
            start_s[rid] = time.perf_counter()
            self._engine.add_request(rid, self._input(prompt, request["cache_salt"]), params, **_lora(request["lora"]))
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                now_s = time.perf_counter()
                rid = output.request_id
                if output.outputs and output.outputs[0].token_ids:
                    first_s.setdefault(rid, now_s)
                if output.finished:
                    done[rid] = _report(output, first_s.get(rid, now_s) - start_s[rid], now_s - start_s[rid])
        return [done[rid] for rid in order]

    @staticmethod
    def _input(prompt: str | list[int], cache_salt: str | None) -> dict[str, Any]:
        out: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt}
        if cache_salt is not None:
            out["cache_salt"] = cache_salt
        return out


def _lora(lora: list[Any] | None) -> dict[str, Any]:
    if lora is None:
        return {}
    from vllm.lora.request import LoRARequest

    return {"lora_request": LoRARequest(*lora)}


def _report(output: Any, ttft_s: float, total_s: float) -> dict[str, Any]:
    completion = output.outputs[0]
    logprobs = [
        sorted(([int(t), p.logprob] for t, p in step.items()), key=lambda pair: -pair[1])
        for step in completion.logprobs or []
    ]
    return {
        "prompt_tokens": len(output.prompt_token_ids),
        "tokens": [int(t) for t in completion.token_ids],
        "text": completion.text,
        "ttft_s": ttft_s,
        "total_s": total_s,
        "cached_tokens": int(output.num_cached_tokens or 0),
        "finish_reason": str(completion.finish_reason),
        "logprobs": logprobs,
    }


if __name__ == "__main__":
    main()
