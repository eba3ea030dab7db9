"""Triton Inference Server: a model repository from a bundle, and the models in it."""
