"""What a Server offers, how its arguments are checked, and how it is found."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import pytest
from pydantic import Field

from node_agent.behaviours import Reject, Server, call, cast
from node_agent.behaviours.interface import BadBehaviour, read_args, to_json
from node_agent.behaviours.loading import load
from node_agent.worker.mailbox import Message
from registry.errors import HerdError, Invalid, NoSuchMethod
from registry.v1 import messages_pb2


@dataclass(frozen=True)
class Order:
    item: str
    count: int = 1


class Colour(enum.Enum):
    RED = "red"


class Opaque:
    """Nothing that JSON could be read into."""


class Shop(Server):
    @call
    async def sell(
        self,
        order: Order,
        at: datetime | None = None,
        colour: Colour = Colour.RED,
        *,
        price: Annotated[Decimal, Field(gt=0)] = Decimal(1),
    ) -> dict[str, Any]:
        """Sell something.

        And more about it.
        """
        return {}

    @cast
    async def wake(self, table: str, limit: int = 10) -> None:
        "Wake up."

    @call
    def blocking(self) -> str:
        return ""

    @call
    async def raw(self, data: bytes) -> bytes:
        return data


class SmallShop(Shop):
    async def wake(self, table: str, limit: int = 1) -> None:
        "Wake up slowly."

    @call
    async def close_up(self) -> None: ...


class Anything(Server):
    async def handle_call(self, event: Message) -> object:
        return event.method


INTERFACE = Shop.interface()


def request(
    method: str, body: str | bytes = "{}", kind: messages_pb2.Kind.ValueType = messages_pb2.KIND_CALL
) -> messages_pb2.Frame:
    frame = messages_pb2.Frame(kind=kind, method=method)
    if isinstance(body, bytes):
        frame.data = body
    else:
        frame.json = body
    return frame


def wake(body: str | bytes) -> messages_pb2.Frame:
    return request("wake", body, messages_pb2.KIND_CAST)


def test_offers_are_described_in_the_authors_order_and_words() -> None:
    assert [(m.name, m.kind, m.signature, m.description) for m in INTERFACE.describe()] == [
        (
            "sell",
            "call",
            (
                "(order: Order, at: datetime | None = None, colour: Colour = <Colour.RED: 'red'>, *, "
                "price: Annotated[Decimal, Field(gt=0)] = Decimal('1')) -> dict[str, Any]"
            ),
            "Sell something.",
        ),
        ("wake", "cast", "(table: str, limit: int = 10) -> None", "Wake up."),
        ("blocking", "call", "() -> str", ""),
        ("raw", "call", "(data: bytes) -> bytes", ""),
    ]


def test_a_subclass_inherits_methods_and_may_override_them_without_the_mark() -> None:
    described = {m.name: m for m in SmallShop.interface().describe()}
    assert list(described) == ["sell", "wake", "blocking", "raw", "close_up"]
    assert described["wake"].kind == "cast"
    assert described["wake"].description == "Wake up slowly."


def test_arguments_arrive_as_the_annotated_types() -> None:
    body = '{"order": {"item": "tea"}, "at": "2026-01-02T03:04:05Z", "colour": "red", "price": "1.50"}'
    assert INTERFACE.arguments(request("sell", body)) == {
        "order": Order("tea"),
        "at": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "colour": Colour.RED,
        "price": Decimal("1.50"),
    }


def test_arguments_with_defaults_may_be_left_out() -> None:
    assert INTERFACE.arguments(wake('{"table": "jobs"}')) == {"table": "jobs"}
    assert INTERFACE.arguments(request("blocking")) == {}
    assert INTERFACE.arguments(messages_pb2.Frame(kind=messages_pb2.KIND_CALL, method="blocking")) == {}


def test_bytes_are_passed_as_they_are() -> None:
    assert INTERFACE.arguments(request("raw", b"\x00\xff")) == {"data": b"\x00\xff"}


@pytest.mark.parametrize(
    ("frame", "text", "hint"),
    [
        (wake("{}"), 'wake: argument "table" (str) is missing', ""),
        (
            wake('{"tabel": "x"}'),
            'wake: argument "table" (str) is missing; there is no argument "tabel"',
            'did you mean "table"?',
        ),
        (
            wake('{"table": "x", "zzz": 1}'),
            'wake: there is no argument "zzz"',
            "there is: table, limit",
        ),
        (
            wake('{"table": 5}'),
            'wake: argument "table" is 5, "table" must be str: input should be a valid string',
            "",
        ),
        (
            wake('{"table": "x", "limit": "5"}'),
            'wake: argument "limit" is "5", "limit" must be int: input should be a valid integer',
            "",
        ),
        (
            wake('{"table": "x", "limit": true}'),
            'wake: argument "limit" is true, "limit" must be int: input should be a valid integer',
            "",
        ),
        (
            request("sell", '{"order": {"item": "tea", "count": 1.5}}'),
            'sell: argument "order.count" is 1.5, "order" must be Order: input should be a valid integer',
            "",
        ),
        (
            request("sell", '{"order": {"item": "tea"}, "price": 0}'),
            (
                'sell: argument "price" is 0, "price" must be Annotated[Decimal, Field(gt=0)]: '
                "input should be greater than 0"
            ),
            "",
        ),
        (
            request("sell", '{"order": {"item": "tea"}, "colour": "blue"}'),
            'sell: argument "colour" is "blue", "colour" must be Colour: input should be \'red\'',
            "",
        ),
        (wake("[1, 2]"), "wake: the arguments must be a JSON object, not [1, 2]", ""),
        (wake("{"), "wake: the arguments are not JSON: EOF while parsing an object at line 1 column 1", ""),
        (wake(b"x"), "wake takes JSON, not 1 bytes", "wake(table: str, limit: int = 10) -> None"),
        (request("raw", '{"data": "x"}'), "raw takes bytes, not JSON", ""),
        (
            request("blocking", '{"table": 1}'),
            'blocking: there is no argument "table"',
            "",
        ),
        (wake('{"table": ' + "1" * 300 + "}"), None, ""),
    ],
)
def test_wrong_arguments_are_refused_naming_argument_type_and_value(
    frame: messages_pb2.Frame, text: str | None, hint: str
) -> None:
    with pytest.raises(Invalid) as refused:
        INTERFACE.arguments(frame)
    assert len(refused.value.message) < 250
    assert refused.value.details["method"] == frame.method
    if text is not None:
        assert (refused.value.message, refused.value.hint) == (text, hint)


@pytest.mark.parametrize(
    ("frame", "text", "hint"),
    [
        (request("sel"), 'no call is named "sel"', 'did you mean "sell"?'),
        (request("zzz"), 'no call is named "zzz"', "there is: sell, blocking, raw"),
        (request("wake"), '"wake" is a cast, not a call', "`pgherd cast` sends a cast"),
        (
            request("sell", kind=messages_pb2.KIND_CAST),
            '"sell" is a call, not a cast',
            "`pgherd call` sends a call",
        ),
        (request("interface"), 'no call is named "interface"', "there is: sell, blocking, raw"),
    ],
)
def test_unknown_methods_are_refused_with_a_hint(frame: messages_pb2.Frame, text: str, hint: str) -> None:
    with pytest.raises(NoSuchMethod) as refused:
        INTERFACE.arguments(frame)
    assert (refused.value.message, refused.value.hint) == (text, hint)


def test_a_catch_all_gets_the_decoded_body() -> None:
    interface = Anything.interface()
    assert interface.arguments(request("whatever", '{"a": [1]}')) == {"a": [1]}
    assert interface.arguments(request("whatever", b"raw")) == b"raw"
    for frame in (request("whatever", "{"), request("whatever", kind=messages_pb2.KIND_CAST)):
        with pytest.raises(HerdError):
            interface.arguments(frame)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_have_are_invalid_arguments(number: str) -> None:
    text = f'{{"table": "7", "limit": {number}}}'
    for interface, asked in ((INTERFACE, wake(text)), (Anything.interface(), request("whatever", text))):
        with pytest.raises(Invalid, match="the arguments are not JSON"):
            interface.arguments(asked)
    assert INTERFACE.arguments(wake(f'{{"table": "{number}"}}')) == {"table": number}


def test_results_are_written_as_json() -> None:
    result = {
        "order": Order("tea"),
        "at": datetime(2026, 1, 2, tzinfo=UTC),
        "price": Decimal("1.5"),
        "id": UUID(int=1),
        "colour": Colour.RED,
        "nothing": None,
    }
    assert to_json("sell", result) == (
        '{"order":{"item":"tea","count":1},"at":"2026-01-02T00:00:00Z","price":"1.5",'
        '"id":"00000000-0000-0000-0000-000000000001","colour":"red","nothing":null}'
    )


def test_a_result_that_json_cannot_say_is_an_error_that_names_the_method() -> None:
    with pytest.raises(TypeError, match=r"sell returned <object object at .*which cannot be written as JSON"):
        to_json("sell", object())
    for number in ("nan", "inf", "-inf"):
        with pytest.raises(TypeError, match=r"sell returned .*: it has no NaN and no Infinity"):
            to_json("sell", {"price": [float(number)]})
    assert to_json("sell", "NaN, -Infinity") == '"NaN, -Infinity"'


def test_rejected_details_are_texts() -> None:
    reject = Reject("no", limit=3)
    assert (reject.reason, reject.details, str(reject)) == ("no", {"limit": "3"}, "no")


def test_impossible_methods_are_errors_of_the_class() -> None:
    class Taken(Server):
        @call
        async def send_after(self) -> None:  # type: ignore[override]
            ...

    class Star(Server):
        @call
        async def many(self, *names: str) -> None: ...

    class Unknown(Server):
        @call
        async def what(self, thing: Missing) -> None:  # type: ignore[name-defined]  # noqa: F821
            ...

    class Unreadable(Server):
        @call
        async def what(self, thing: Opaque) -> None: ...

    class Plain(Server):
        def handle_call(self, event: Message) -> None: ...

    for behaviour, text in (
        (Taken, "Taken.send_after: this name is taken by the runtime"),
        (Star, "Star.many: arguments come by name, so it cannot take *names"),
        (Unknown, "Unknown.what: its annotations cannot be read: name 'Missing' is not defined"),
        (Unreadable, "Unreadable.what cannot be checked: Unable to generate pydantic-core schema for"),
        (Plain, "Plain.handle_call must be `async def handle_call(self, event)`"),
    ):
        with pytest.raises(BadBehaviour) as bad:
            behaviour.interface()
        assert text in str(bad.value)


class Configured(Server):
    @dataclass(frozen=True)
    class Args:
        table: str
        limits: list[int] = field(default_factory=list)
        seen: int = field(default=0, init=False)


def test_args_become_the_nested_dataclass() -> None:
    assert read_args(Configured, {"table": "jobs", "limits": [1]}) == Configured.Args("jobs", [1])
    assert read_args(Shop, {"any": "thing"}) == {"any": "thing"}


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({}, 'Configured: args: argument "table" (str) is missing'),
        (
            {"table": "x", "limit": 3},
            'Configured: args: there is no argument "limit" (did you mean "limits"?)',
        ),
        (
            {"table": 3},
            'Configured: args: argument "table" is 3, "table" must be str: input should be a valid string',
        ),
    ],
)
def test_wrong_args_are_named(args: dict[str, Any], text: str) -> None:
    with pytest.raises(BadBehaviour) as bad:
        read_args(Configured, args)
    assert str(bad.value) == text


def test_a_behaviour_is_found_in_the_specs_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shop_of_a_spec.py").write_text(
        "from node_agent.behaviours import Server\nclass Shop(Server): pass\n"
    )
    monkeypatch.setattr("sys.path", ["/nowhere"])
    assert load("shop_of_a_spec:Shop", [str(tmp_path)]).__name__ == "Shop"


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("shop", 'behaviour "shop" must be written "module:Class"'),
        ("shop_that_is_not:Shop", "cannot import shop_that_is_not: ModuleNotFoundError: No module named"),
        ("tests.support.daemons:Prob", 'has no class Prob: did you mean "Probe"?'),
        ("tests.support.daemons:Order", "is not a node_agent.behaviours.Server"),
    ],
)
def test_a_behaviour_that_cannot_be_found_is_named(target: str, text: str) -> None:
    with pytest.raises(BadBehaviour) as bad:
        load(target)
    assert text in str(bad.value)


def test_an_import_error_says_which_line_of_whose_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", ["/nowhere"])
    (tmp_path / "broken_shop.py").write_text("x = 1\nimport no_such_module_anywhere\n")
    with pytest.raises(BadBehaviour) as bad:
        load("broken_shop:Shop", [str(tmp_path)])
    assert "\n" not in str(bad.value)
    assert str(bad.value).endswith(f"({tmp_path}/broken_shop.py:2)")
    assert isinstance(bad.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize("name", ["registry.py", "node_agent/__init__.py"])
def test_modules_with_our_names_are_refused_naming_both_files(tmp_path: Path, name: str) -> None:
    theirs = tmp_path / name
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("")
    with pytest.raises(BadBehaviour) as bad:
        load("shop:Shop", [str(tmp_path)])
    assert str(theirs) in str(bad.value)
    assert f"/{name.removesuffix('.py').removesuffix('/__init__')}/__init__.py," in str(bad.value)
