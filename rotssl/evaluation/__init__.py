"""Measures of what an encoder has learned."""
