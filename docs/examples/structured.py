"""An answer that is JSON of a given schema. Usage: structured.py [BASE_URL]"""

import json
import sys
import urllib.request

BASE = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome", "Berlin"]}, "is_capital": {"type": "boolean"}},
    "required": ["city", "is_capital"],
    "additionalProperties": False,
}
body = {
    "messages": [{"role": "user", "content": "What is the capital of France? Answer in JSON."}],
    "response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}},
    "max_tokens": 60,
    "temperature": 0,
}
request = urllib.request.Request(
    f"{BASE}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
)
with urllib.request.urlopen(request, timeout=60) as answer:
    content = json.load(answer)["choices"][0]["message"]["content"]
print(json.loads(content))
