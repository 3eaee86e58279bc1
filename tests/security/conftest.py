"""Fakes of the router, worker and transfer tests serve here too."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("router", "workers", "transfer"):
    sys.path.append(str(Path(__file__).resolve().parent.parent / folder))
