"""Packing: from any source of images to a packed set."""
