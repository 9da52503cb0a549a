"""What the programs in jobs/ do, one module each."""
