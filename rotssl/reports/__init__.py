"""Statistics, tables, plots and pages made from recorded runs."""
