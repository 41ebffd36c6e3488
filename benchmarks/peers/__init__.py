"""The same GPT as others write it, each as `make(vocab, batch, length, layers, heads, width) -> step()`."""
