"""Duopool: disaggregated prefill/decode serving for language models."""

__version__ = "0.1.0"
