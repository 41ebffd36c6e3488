"""What is computed: families of models as pure functions. The only room that imports flax."""
