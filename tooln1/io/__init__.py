"""Errors with exit codes, atomic files, JSONL and the Hugging Face layout; imports nothing else of this project."""
