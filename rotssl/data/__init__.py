"""Image data: reading, decoding, caching, batches and random views."""
