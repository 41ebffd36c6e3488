"""Kernels of attention, a module each with a `KERNEL`; and products, norms and lookups with their own gradients."""
