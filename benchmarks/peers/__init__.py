"""The same GPT in other frameworks, each as `make(vocab, batch, length, layers, heads, width) -> step()`."""
