"""The message classes of jobs.proto, made when the program starts, so that no generated code has to be kept or built.

Knows as much of protobuf's language as that file uses: messages, and fields that are optional, repeated or one of several.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_File = descriptor_pb2.FileDescriptorProto
_Message = descriptor_pb2.DescriptorProto
_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "bool": _Field.TYPE_BOOL,
    "bytes": _Field.TYPE_BYTES,
    "double": _Field.TYPE_DOUBLE,
    "float": _Field.TYPE_FLOAT,
    "int64": _Field.TYPE_INT64,
    "string": _Field.TYPE_STRING,
    "uint32": _Field.TYPE_UINT32,
}
_BLOCK = re.compile(r"^message (\w+) \{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_PART = re.compile(
    r"\s*(?:oneof (?P<one>\w+) \{|(?P<end>\})|(?:(?P<label>\w+) )?(?P<type>\w+) (?P<name>\w+) = (?P<number>\d+);)"
)


def described(text: str) -> _File:
    """What protoc would make of the messages in the text of a .proto file. Raises ValueError for what is not understood."""
    package = re.search(r"^package ([\w.]+);", text, re.MULTILINE)
    if package is None:
        raise ValueError("the .proto file names no package")
    file = _File(name="petals_win/jobs/jobs.proto", package=package[1], syntax="proto3")
    for name, body in _BLOCK.findall(re.sub(r"//[^\n]*", "", text)):
        _read_fields(file.message_type.add(name=name), body, package[1])
    return file


def _read_fields(message: _Message, body: str, package: str) -> None:
    one: int | None = None  # the index of the oneof that is open
    alone: list[_Field] = []
    position = 0
    while body[position:].strip():
        part = _PART.match(body, position)
        if part is None:
            raise ValueError(f"message {message.name}: {body[position:].strip()[:60]!r} is not understood")
        position = part.end()
        if part["one"]:
            message.oneof_decl.add(name=part["one"])
            one = len(message.oneof_decl) - 1
        elif part["end"]:
            one = None
        else:
            repeated = part["label"] == "repeated"
            field = message.field.add(name=part["name"], number=int(part["number"]))
            field.label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
            if part["type"] in _SCALARS:
                field.type = _SCALARS[part["type"]]
            else:
                field.type, field.type_name = _Field.TYPE_MESSAGE, f".{package}.{part['type']}"
            if one is not None:
                field.oneof_index = one
            if part["label"] == "optional":
                alone.append(field)
    for field in alone:  # behind the named ones, as protoc has them
        field.proto3_optional, field.oneof_index = True, len(message.oneof_decl)
        message.oneof_decl.add(name=f"_{field.name}")


def _classes() -> dict[str, Any]:
    file = described(Path(__file__).with_name("jobs.proto").read_text(encoding="utf-8"))
    pool = descriptor_pool.DescriptorPool()  # of its own: hivemind's and petals' are in the default one
    made = pool.AddSerializedFile(file.SerializeToString())
    found = made if made is not None else pool.FindFileByName(file.name)
    return {name: message_factory.GetMessageClass(message) for name, message in found.message_types_by_name.items()}


MESSAGES = _classes()
Hello, Question, Tokens, Reply, Weighed = (
    MESSAGES[name] for name in ("Hello", "Question", "Tokens", "Reply", "Weighed")
)
SERVICE = "petals_win.jobs.v1.Jobs"
