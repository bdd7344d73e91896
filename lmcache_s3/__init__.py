"""LMCache-S3: a KV cache for LLM serving that lives in object storage."""
