"""jaxllm: the whole life of a large language model, on JAX."""

__version__ = "0.1.0"
