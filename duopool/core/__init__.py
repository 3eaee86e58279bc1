"""Bookkeeping in plain Python: no torch, no ray, no grpc below this folder."""
