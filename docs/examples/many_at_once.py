"""Many prompts at once over gRPC, each with its stage times. Usage: many_at_once.py [HOST:PORT]"""

import asyncio
import sys

from duopool.client import AsyncClient
from duopool.proto.inference_pb2 import Finished, TokenChunk

PROMPTS = [f"The {word} of France is" for word in ("capital", "largest river", "highest mountain", "flag")]


async def ask(client: AsyncClient, prompt: str) -> None:
    text = ""
    async for event in client.generate(prompt, max_tokens=12, temperature=0.0):
        if isinstance(event, TokenChunk):
            text += event.text
        elif isinstance(event, Finished):
            times = event.times
            print(
                f"{prompt}{text!r}: queue {times.queue_s * 1e3:.0f} ms, prefill {times.prefill_s * 1e3:.0f} ms, "
                f"transfer {times.transfer_s * 1e3:.0f} ms, decode {times.decode_s * 1e3:.0f} ms"
            )


async def main() -> None:
    async with AsyncClient(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051") as client:
        await asyncio.gather(*(ask(client, prompt) for prompt in PROMPTS))


asyncio.run(main())
