def bench() -> None:
    """Measure."""
