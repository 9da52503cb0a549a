"""Instance similarity: projections in, a loss out. The registry is in rotssl.config.methods."""
