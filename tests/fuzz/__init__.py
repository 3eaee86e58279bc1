"""Wrong input on every wire. gRPC's own log of it is as long as it is expected."""

import logging
import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")
logging.getLogger("grpc").setLevel(logging.CRITICAL)
