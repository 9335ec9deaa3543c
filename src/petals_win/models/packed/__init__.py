"""Formats in which people publish quantized weights: how each shows in names of tensors, and how it is made plain again."""
