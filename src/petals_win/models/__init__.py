"""What a model is on disk and in memory: where it comes from, its tensors, its tokenizer. Does not know computing or networks."""
