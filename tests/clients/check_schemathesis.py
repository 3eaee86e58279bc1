"""schemathesis: requests made from the OpenAPI document, right and wrong ones; the answers are as it says.

Without `positive_data_acceptance`: bounds that depend on the model (context length, vocabulary) or on two fields
together stand in no schema, and are refused with 400.
"""

from __future__ import annotations

from system import BIN, HTTP, run

print(
    run(
        *(BIN / "schemathesis", "run", f"{HTTP}/openapi.json", "--checks", "all"),
        *("--exclude-checks", "positive_data_acceptance"),
        *("--phases", "coverage,fuzzing", "--max-examples", 8, "--max-time", 60, "--seed", 7, "--no-color"),
    )[-600:]
)
