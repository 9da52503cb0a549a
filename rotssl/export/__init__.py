"""A pretrained encoder elsewhere: loaded in one line, and in the formats of other libraries."""
