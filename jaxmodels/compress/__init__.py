"""Smaller and adapted: adapters beside frozen weights."""
