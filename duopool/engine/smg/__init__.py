"""The `vllm.grpc.engine.VllmEngine` protocol of smg-grpc-proto, so that the `smg` gateway can drive the pools.

1. The gateway's PD mode sends a prompt to a prefill worker with `max_tokens = 1`. It is prefilled there as for our own
router, and the answer carries a handle: where the blocks lie, under which lease, and the first token (`handle.py`).
2. The gateway passes the handle on, unread, with the client's own parameters to a decode worker. That one pulls the
blocks and decodes from token 2 (`legs.py`); a handle that is worthless by then costs a prefill there, not the request.

To the worker each of them is a session like a router's (`exchange.py`); nothing else of it knows this protocol.
"""
