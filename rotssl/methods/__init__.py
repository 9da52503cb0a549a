"""Pretraining methods: from projections to a loss. The registry is in rotssl.config.methods."""
