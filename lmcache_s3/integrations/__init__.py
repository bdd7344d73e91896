"""Adapters to LLM engines. Each imports its engine; nothing else in the package does."""
