"""Tensors: model loading, the KV store, the forward step, sampling and block transfer."""
