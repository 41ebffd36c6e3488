"""The kernels of attention: one module each, `attend(q, k, v, ...)`, all of the same signature."""
