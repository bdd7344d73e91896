"""`lmcache-s3 init`: can this bucket hold a shared cache? Writes the probe's few small objects and removes them."""

from __future__ import annotations

import json

from lmcache_s3.analysis.catalog import list_spaces
from lmcache_s3.cli.common import Cli
from lmcache_s3.index.probe import probe


def vllm_line(cli: Cli) -> str:
    """The `vllm serve` line for these settings, to copy."""
    transfer = {
        "kv_connector": "LMCacheS3Connector",
        "kv_connector_module_path": "lmcache_s3.integrations.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"url": cli.settings.url, **cli.given},
    }
    quoted = json.dumps(transfer).replace("'", "'\\''")
    return f"vllm serve MODEL --kv-transfer-config '{quoted}'"


def init(cli: Cli) -> None:
    """Check that a bucket can hold a shared cache, and print the line that starts vLLM with it."""
    cli.store.check()
    found = sum(1 for _ in list_spaces(cli.store))
    probed = not (cli.settings.read_only or cli.settings.single_writer)
    if probed:
        probe(cli.store, "")
    line = vllm_line(cli)
    holds = (
        f"holds {found} space{'s' if found != 1 else ''} already" if found else "is empty: spaces are made on first use"
    )
    cli.emit(
        {"url": cli.store.url, "spaces": found, "put_if_absent": True if probed else None, "vllm": line},
        f"[green]ok[/green] {cli.store.url} can be shared, and {holds}. Start engines with:\n",
    )
    if not cli.as_json:
        print(line)  # not through rich, which would wrap and style it
