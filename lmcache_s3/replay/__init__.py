"""What tiers and policies would have done with a recorded trace of requests: hits, bytes, dollars; no KV needed."""
