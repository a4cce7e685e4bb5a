"""The wire contract may grow and never change: names, numbers and types stay from release to release.

`python -m tests.contract.test_wire_descriptor` writes the present contract into the golden file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.internal import api_implementation
from grpc_tools import protoc

from matcher_service import wire
from matcher_service.wire import matcher_pb2, matcher_pb2_grpc

GOLDEN = Path(__file__).with_name("wire_descriptor.golden.txt")
REPOSITORY = Path(wire.__file__ or "").parents[2]
PROTO = "matcher_service/wire/matcher.proto"

Field = descriptor_pb2.FieldDescriptorProto


def contract(file: descriptor_pb2.FileDescriptorProto) -> list[str]:
    """One line for each thing that a peer relies on, in order of declaration."""
    return [f"package {file.package}", *_enums(file.enum_type, ""), *_messages(file.message_type, ""), *_methods(file)]


def _messages(messages: list[descriptor_pb2.DescriptorProto], scope: str) -> Iterator[str]:
    for message in messages:
        name = f"{scope}{message.name}"
        for field in message.field:
            kind = field.type_name or Field.Type.Name(field.type).removeprefix("TYPE_").lower()
            label = "repeated " if field.label == Field.LABEL_REPEATED else ""
            if field.proto3_optional:
                label = "optional "
            elif field.HasField("oneof_index"):
                label = f"oneof {message.oneof_decl[field.oneof_index].name} "
            yield f"{name}.{field.name} = {field.number}: {label}{kind}"
        yield from _enums(message.enum_type, f"{name}.")
        yield from _messages(list(message.nested_type), f"{name}.")


def _enums(enums: list[descriptor_pb2.EnumDescriptorProto], scope: str) -> Iterator[str]:
    for enum in enums:
        yield from (f"enum {scope}{enum.name}.{value.name} = {value.number}" for value in enum.value)


def _methods(file: descriptor_pb2.FileDescriptorProto) -> Iterator[str]:
    for service in file.service:
        for method in service.method:
            asks = f"{'stream ' if method.client_streaming else ''}{method.input_type}"
            answers = f"{'stream ' if method.server_streaming else ''}{method.output_type}"
            yield f"rpc {service.name}.{method.name}({asks}) returns ({answers})"


def broken(released: list[str], present: list[str]) -> list[str]:
    """What was released and no longer holds. Additions break nothing."""
    held = set(present)
    return [line for line in released if line not in held]


def present_file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto()
    matcher_pb2.DESCRIPTOR.CopyToProto(file)
    return file


def test_everything_released_on_the_wire_still_holds() -> None:
    released = GOLDEN.read_text(encoding="utf-8").splitlines()
    assert broken(released, contract(present_file())) == []


def test_the_golden_file_covers_every_message_and_method() -> None:
    released = GOLDEN.read_text(encoding="utf-8").splitlines()
    for message in present_file().message_type:
        assert any(line.startswith(f"{message.name}.") for line in released), message.name
    assert sum(line.startswith("rpc ") for line in released) == 5


def _without_a_field(file: descriptor_pb2.FileDescriptorProto) -> None:
    del file.message_type[1].field[3]


def _renumbered(file: descriptor_pb2.FileDescriptorProto) -> None:
    file.message_type[1].field[2].number = 90


def _retyped(file: descriptor_pb2.FileDescriptorProto) -> None:
    file.message_type[1].field[4].type = Field.TYPE_INT64


def _renamed(file: descriptor_pb2.FileDescriptorProto) -> None:
    file.message_type[1].field[0].name = "other"


def _singular(file: descriptor_pb2.FileDescriptorProto) -> None:
    file.message_type[1].field[3].label = Field.LABEL_OPTIONAL


def _out_of_its_oneof(file: descriptor_pb2.FileDescriptorProto) -> None:
    field = next(one for one in file.message_type[1].field if one.name == "deployment_id")
    field.ClearField("oneof_index")


def _renumbered_value(file: descriptor_pb2.FileDescriptorProto) -> None:
    file.enum_type[0].value[1].number = 7


def _unary(file: descriptor_pb2.FileDescriptorProto) -> None:
    file.service[0].method[1].server_streaming = False


def _without_a_method(file: descriptor_pb2.FileDescriptorProto) -> None:
    del file.service[0].method[2]


@pytest.mark.parametrize(
    "change",
    [
        _without_a_field,
        _renumbered,
        _retyped,
        _renamed,
        _singular,
        _out_of_its_oneof,
        _renumbered_value,
        _unary,
        _without_a_method,
    ],
)
def test_a_change_of_what_was_released_is_seen(change: Callable[[descriptor_pb2.FileDescriptorProto], None]) -> None:
    file = present_file()
    released = contract(file)
    change(file)
    assert broken(released, contract(file))


def test_an_addition_breaks_nothing() -> None:
    file = present_file()
    released = contract(file)
    file.message_type[1].field.add(name="more", number=99, type=Field.TYPE_BOOL, label=Field.LABEL_OPTIONAL)
    file.message_type.add(name="More")
    file.enum_type[0].value.add(name="MORE", number=9)
    assert broken(released, contract(file)) == []


def test_the_generated_code_is_that_of_the_proto(tmp_path: Path) -> None:
    arguments = [
        "protoc",
        f"-I{REPOSITORY}",
        f"--descriptor_set_out={tmp_path / 'set'}",
        f"--grpc_python_out={tmp_path}",
        str(REPOSITORY / PROTO),
    ]
    assert protoc.main(arguments) == 0
    compiled = descriptor_pb2.FileDescriptorSet.FromString((tmp_path / "set").read_bytes()).file[0]
    generated = present_file()
    assert contract(compiled) == contract(generated)
    methods = {method.name for method in compiled.service[0].method}
    assert methods <= set(dir(matcher_pb2_grpc.MatcherServicer))


def test_messages_are_parsed_by_the_compiled_parser() -> None:
    """The pure Python one is slow, and has had unbounded recursion."""
    assert api_implementation.Type() == "upb"


if __name__ == "__main__":
    GOLDEN.write_text("\n".join(contract(present_file())) + "\n", encoding="utf-8")
