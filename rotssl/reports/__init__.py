"""Curves, plots and tables from recorded runs."""
