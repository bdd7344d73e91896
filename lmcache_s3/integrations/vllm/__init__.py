"""vLLM plugin: `"kv_connector_module_path": "lmcache_s3.integrations.vllm"` in --kv-transfer-config."""

from lmcache_s3.integrations.vllm.connector import LMCacheS3Connector

__all__ = ["LMCacheS3Connector"]
