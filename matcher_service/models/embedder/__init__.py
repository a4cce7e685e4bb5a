"""Photographs of faces to raw templates. Needs the extra `embedder`; nothing else of the service does."""
