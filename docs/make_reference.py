"""Writes docs/reference/ from what clients talk to: the .proto file and the OpenAPI document. Run by `make reference`.

Nothing in docs/reference/ is written by hand; a test says so.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROTO = "duopool/proto/inference.proto"
MADE = "<!-- Made by `make reference`; changes belong into the source. -->"


def main() -> None:
    folder = ROOT / "docs" / "reference"
    folder.mkdir(exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Every page by its file's name."""
    return {"grpc.md": grpc_page(), "http.md": http_page(openapi())}


# ---- gRPC ------------------------------------------------------------------------------------------------------------

SERVICE, MESSAGE, METHOD, FIELD, ENUM, VALUE = 6, 4, 2, 2, 5, 2
"""Field numbers in descriptor.proto, of which the paths of comments are made."""


def grpc_page() -> str:
    file = _descriptor()
    comments = {tuple(place.path): _comment(place) for place in file.source_code_info.location}
    lines = [f"# gRPC: `{file.package}`", "", MADE, ""]
    for at, service in enumerate(file.service):
        lines += [
            f"## {service.name}",
            "",
            comments.get((SERVICE, at), ""),
            "",
            "| call | takes | gives | |",
            "|---|---|---|---|",
        ]
        for index, method in enumerate(service.method):
            gives = ("stream of " if method.server_streaming else "") + _link(method.output_type)
            about = comments.get((SERVICE, at, METHOD, index), "")
            lines.append(f"| `{method.name}` | {_link(method.input_type)} | {gives} | {about} |")
        lines.append("")
    for at, message in enumerate(file.message_type):
        lines += [f"## {message.name}", "", comments.get((MESSAGE, at), ""), ""]
        if message.field:
            lines += ["| field | type | |", "|---|---|---|"]
        for index, field in enumerate(message.field):
            about = comments.get((MESSAGE, at, FIELD, index), "")
            lines.append(f"| `{field.name}` | {_type(field, message)} | {about} |")
        lines.append("")
    return "\n".join(_single_blanks(lines)) + "\n"


def _descriptor() -> Any:
    from google.protobuf.descriptor_pb2 import FileDescriptorSet

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "set"
        # In a process of its own: protoc's library does not bear being loaded beside others that bring protobuf along.
        flags = [f"-I{ROOT}", "--include_source_info", f"--descriptor_set_out={target}"]
        subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *flags, str(ROOT / PROTO)], check=True)
        return FileDescriptorSet.FromString(target.read_bytes()).file[0]


def _comment(place: Any) -> str:
    text = place.leading_comments or place.trailing_comments
    return " ".join(line.strip() for line in text.strip().splitlines()).replace("|", "\\|")


def _type(field: Any, message: Any) -> str:
    from google.protobuf.descriptor_pb2 import FieldDescriptorProto

    entries = {f".{nested.name}": nested for nested in message.nested_type if nested.options.map_entry}
    entry = next((nested for name, nested in entries.items() if field.type_name.endswith(name)), None)
    if entry is not None:
        return f"map of {_type(entry.field[0], message)} to {_type(entry.field[1], message)}"
    name = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    shown = _link(field.type_name) if field.type_name else name
    return f"list of {shown}" if field.label == FieldDescriptorProto.LABEL_REPEATED else shown


def _link(type_name: str) -> str:
    name = type_name.rpartition(".")[2]
    return f"[{name}](#{name.lower()})"


# ---- HTTP ------------------------------------------------------------------------------------------------------------


def openapi() -> dict[str, Any]:
    """The document that a router serves at /openapi.json; no system is started."""
    from unittest.mock import Mock

    from duopool.router.http.app import make_app

    # Routes only keep what they are given until a call comes.
    parts = [Mock() for _ in range(3)]
    document: dict[str, Any] = make_app(*parts, max_body_bytes=1).openapi()  # type: ignore[call-arg]
    return document


def http_page(document: dict[str, Any]) -> str:
    lines = ["# HTTP", "", MADE, "", "What the fields mean is told in [../http.md](../http.md).", ""]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            lines += [
                f"## {method.upper()} {path}",
                "",
                operation.get("description") or operation.get("summary", ""),
                "",
            ]
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            if body is not None:
                lines += ["| field | type | default |", "|---|---|---|", *_fields(body, document), ""]
            # FastAPI lists its own 422; what fails its checks is answered with 400.
            answers = {code: told["description"] for code, told in operation["responses"].items() if code != "422"}
            lines += [f"Answers: {', '.join(f'{code} ({text})' for code, text in answers.items())}.", ""]
    return "\n".join(_single_blanks(lines)) + "\n"


def _fields(schema: dict[str, Any], document: dict[str, Any]) -> Iterator[str]:
    schema = _resolved(schema, document)
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        default = (
            "required" if name in required else f"`{field['default']}`" if field.get("default") is not None else ""
        )
        yield f"| `{name}` | {_kind(field)} | {default} |"


def _resolved(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def _kind(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if "anyOf" in schema:
        kinds = [_kind(option) for option in schema["anyOf"] if option.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return str(schema.get("type", "any"))


def _single_blanks(lines: Sequence[str]) -> Iterator[str]:
    last = None
    for line in lines:
        if line or last:
            yield line
        last = line


if __name__ == "__main__":
    main()
