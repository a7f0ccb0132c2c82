"""What a behaviour offers: which methods, with which arguments, and how requests and results are checked.

Made once for each class, from its annotations.  Arguments come as the members of a JSON object and are
checked by pydantic in strict mode (``"5"`` is no int), results are written by pydantic's serializer, which
knows dataclasses, datetimes, enums, UUIDs, decimals and models.  Every refusal names method, argument and
value.
"""

from __future__ import annotations

import difflib
import inspect
import json
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Literal, NotRequired, Required

import pydantic_core
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from typing_extensions import TypedDict

from node_agent.behaviours.plain import plain_reader, plain_schema
from registry.errors import Invalid, NoSuchMethod
from registry.v1 import messages_pb2, names_pb2

Kind = Literal["call", "cast"]

MARK = "_pgherd_kind"
"""The attribute by which ``@call`` and ``@cast`` mark a function."""

SHOWN = 100
"""Characters of a wrong value that are repeated in an error."""


class BadBehaviour(Exception):
    """A behaviour class or its arguments cannot be used; the message is one line for its author."""


class Parameters:
    """Named, typed values that are read from a JSON object."""

    def __init__(
        self, owner: str, types: Mapping[str, Any], written: Mapping[str, object], required: Iterable[str]
    ) -> None:
        """``written`` is how the author wrote each of the ``types``; ``owner`` begins every error."""
        self._owner = owner
        self._types = {name: _type_text(written.get(name, kind)) for name, kind in types.items()}
        self.required = frozenset(required)
        self._plain = {name: schema for name, kind in types.items() if (schema := plain_schema(kind))}
        self._read: Callable[[str], Any] | None = None
        if len(self._plain) < len(types):
            self._read = self._made_by_pydantic(types)

    def _made_by_pydantic(self, types: Mapping[str, Any]) -> Callable[[str], Any]:
        members = {
            name: Required[kind] if name in self.required else NotRequired[kind]
            for name, kind in types.items()
        }
        # A TypedDict made at run time, which type checkers have no notion of.
        make: Any = TypedDict
        shape = make(self._owner, members)
        shape.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)
        try:
            return TypeAdapter(shape).validator.validate_json
        except (PydanticUserError, TypeError) as error:
            raise BadBehaviour(f"{self._owner} cannot be checked: {str(error).splitlines()[0]}") from error

    def read(self, text: str) -> dict[str, Any]:
        """Return the values in the JSON object ``text``.  Raises :class:`registry.errors.Invalid`."""
        if self._read is None:
            members = {name: (schema, name in self.required) for name, schema in self._plain.items()}
            self._read = plain_reader(members)
        try:
            return typing.cast(dict[str, Any], self._read(text))
        except ValidationError as error:
            raise self._invalid(error) from None
        except Exception as error:
            raise Invalid(
                f"{self._owner}: the arguments could not be read: {type(error).__name__}: {error}",
                details={"method": self._owner},
            ) from error

    def _invalid(self, error: ValidationError) -> Invalid:
        problems = error.errors(include_url=False, include_context=False)
        texts = [self._describe(problem) for problem in problems[:5]]
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        details = {"method": self._owner}
        if problems[0]["loc"]:
            details["argument"] = str(problems[0]["loc"][0])
        return Invalid(f"{self._owner}: {'; '.join(texts)}{more}", hint=self._hint(problems), details=details)

    def _describe(self, problem: pydantic_core.ErrorDetails) -> str:
        location, kind, value = problem["loc"], problem["type"], problem["input"]
        if not location:
            if kind == "json_invalid":
                return f"the arguments are not JSON: {problem['msg'].removeprefix('Invalid JSON: ')}"
            return f"the arguments must be a JSON object, not {shown(value)}"
        argument = str(location[0])
        if len(location) == 1 and kind == "missing":
            return f'argument "{argument}" ({self._types[argument]}) is missing'
        if len(location) == 1 and kind == "extra_forbidden":
            return f'there is no argument "{argument}"'
        path = ".".join(str(part) for part in location)
        wanted = self._types[argument]
        reason = problem["msg"][:1].lower() + problem["msg"][1:]
        return f'argument "{path}" is {shown(value)}, "{argument}" must be {wanted}: {reason}'

    def _hint(self, problems: list[pydantic_core.ErrorDetails]) -> str:
        for problem in problems:
            if problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1:
                return did_you_mean(str(problem["loc"][0]), self._types)
        return ""


@dataclass(frozen=True, slots=True)
class Offered:
    """One method of a behaviour.  ``takes_bytes``: its one argument ``data`` is the body as it came."""

    name: str
    kind: Kind
    function: Callable[..., Any]
    is_async: bool
    parameters: Parameters
    takes_bytes: bool
    signature: str
    description: str

    def arguments(self, frame: messages_pb2.Frame) -> dict[str, Any]:
        """Return the arguments in ``frame`` by name.  Raises :class:`registry.errors.Invalid`."""
        which = frame.WhichOneof("body")
        if self.takes_bytes:
            if which == "data":
                return {"data": frame.data}
            raise Invalid(f"{self.name} takes bytes, not JSON", details={"method": self.name})
        if which == "data":
            raise Invalid(
                f"{self.name} takes JSON, not {len(frame.data)} bytes",
                hint=f"{self.name}{self.signature}",
                details={"method": self.name},
            )
        text = frame.json if which else "{}"
        if text == "{}" and not self.parameters.required:
            return {}
        if (why := _not_finite(text)) is not None:
            raise Invalid(f"{self.name}: the arguments are not JSON: {why}", details={"method": self.name})
        return self.parameters.read(text)


class Interface:
    """The methods of one behaviour class."""

    def __init__(self, behaviour: type, base: type) -> None:
        """Collect the marked methods of ``behaviour``; raises :class:`BadBehaviour` for an impossible one."""
        self.methods: dict[str, Offered] = {
            name: _offered(behaviour, base, name, kind) for name, kind in _marked(behaviour, base).items()
        }
        self.handle_call: Callable[..., Any] | None = _catch_all(behaviour, "handle_call")
        self.handle_cast: Callable[..., Any] | None = _catch_all(behaviour, "handle_cast")

    def describe(self) -> tuple[names_pb2.Method, ...]:
        """Return the methods as they are told to people and other processes, in the author's order."""
        return tuple(
            names_pb2.Method(name=m.name, kind=m.kind, signature=m.signature, description=m.description)
            for m in self.methods.values()
        )

    def arguments(self, frame: messages_pb2.Frame) -> Any:
        """Return what the handler for ``frame`` (a CALL or CAST) is given.

        Raises :class:`registry.errors.NoSuchMethod` or :class:`registry.errors.Invalid`.
        """
        kind: Kind = "call" if frame.kind == messages_pb2.KIND_CALL else "cast"
        method = self.methods.get(frame.method)
        if method is not None and method.kind == kind:
            return method.arguments(frame)
        if (self.handle_call if kind == "call" else self.handle_cast) is None:
            raise self._no_such_method(frame.method, kind)
        if frame.WhichOneof("body") == "data":
            return frame.data
        try:
            return pydantic_core.from_json(frame.json or "{}", allow_inf_nan=False)
        except ValueError as error:
            raise Invalid(f"{frame.method}: the arguments are not JSON: {error}") from None

    def _no_such_method(self, name: str, kind: Kind) -> NoSuchMethod:
        details = {"method": name}
        if (method := self.methods.get(name)) is not None:
            hint = f"`pgherd {method.kind}` sends a {method.kind}"
            return NoSuchMethod(f'"{name}" is a {method.kind}, not a {kind}', hint=hint, details=details)
        same = [method.name for method in self.methods.values() if method.kind == kind]
        return NoSuchMethod(f'no {kind} is named "{name}"', hint=did_you_mean(name, same), details=details)


def read_args(behaviour: type, args: Mapping[str, Any]) -> Any:
    """Return what ``self.args`` will be: an instance of the nested dataclass ``Args``, or the plain mapping.

    Raises :class:`BadBehaviour` for arguments that do not fit.
    """
    kind = getattr(behaviour, "Args", None)
    if kind is None:
        return dict(args)
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise BadBehaviour(f"{behaviour.__name__}.Args must be a dataclass")
    types = _hints(kind, f"{behaviour.__name__}.Args")
    named = [f for f in fields(kind) if f.init]
    required = [f.name for f in named if f.default is MISSING and f.default_factory is MISSING]
    parameters = Parameters(
        "args", {f.name: types[f.name] for f in named}, {f.name: f.type for f in named}, required
    )
    try:
        return kind(**parameters.read(json.dumps(args)))
    except Invalid as error:
        hint = f" ({error.hint})" if error.hint else ""
        raise BadBehaviour(f"{behaviour.__name__}: {error.message}{hint}") from None


def to_json(method: str, result: Any) -> str:
    """Return ``result`` as JSON text.  Raises TypeError for a value that JSON cannot say, as NaN."""
    try:
        text = pydantic_core.to_json(result, inf_nan_mode="constants").decode()
    except (pydantic_core.PydanticSerializationError, ValueError) as error:
        raise TypeError(
            f"{method} returned {shown(result)}, which cannot be written as JSON: {error}"
        ) from error
    if (why := _not_finite(text)) is not None:
        raise TypeError(f"{method} returned {shown(result)}, which cannot be written as JSON: {why}")
    return text


def _not_finite(text: str) -> str | None:
    """Return why ``text`` is no JSON if that is for NaN, Infinity or -Infinity, which parsers let through."""
    if "NaN" not in text and "Infinity" not in text:
        return None
    try:
        pydantic_core.from_json(text, allow_inf_nan=False)
    except ValueError as error:
        return f"it has no NaN and no Infinity: {error}"
    return None


def shown(value: Any) -> str:
    """Return ``value`` as JSON where it can be, and not too much of it."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a hint that names what was probably meant, or what there is; empty if there is nothing."""
    names = list(known)
    if close := difflib.get_close_matches(word, names, n=1):
        return f'did you mean "{close[0]}"?'
    return f"there is: {', '.join(names)}" if names else ""


def _marked(behaviour: type, base: type) -> dict[str, Kind]:
    """Return name and kind of every marked method, in the order of definition; a mark is inherited."""
    found: dict[str, Kind] = {}
    for owner in reversed(behaviour.__mro__):
        for name, value in vars(owner).items():
            if (kind := getattr(value, MARK, None)) is None:
                continue
            if name.startswith("_") or name in vars(base):
                raise BadBehaviour(f"{behaviour.__name__}.{name}: this name is taken by the runtime")
            found[name] = kind
    return found


def _offered(behaviour: type, base: type, name: str, kind: Kind) -> Offered:
    function = getattr(behaviour, name)
    label = f"{behaviour.__name__}.{name}"
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())[1:]
    types = _hints(function, label)
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise BadBehaviour(f"{label}: arguments come by name, so it cannot take {parameter}")
    named = {parameter.name: types.get(parameter.name, Any) for parameter in parameters}
    required = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    try:
        checked = Parameters(name, named, {p.name: p.annotation for p in parameters}, required)
    except BadBehaviour as bad:
        raise BadBehaviour(f"{behaviour.__name__}.{bad}") from bad.__cause__
    return Offered(
        name=name,
        kind=kind,
        function=function,
        is_async=inspect.iscoroutinefunction(function),
        parameters=checked,
        takes_bytes=named == {"data": bytes},
        signature=_written(signature, parameters),
        description=(inspect.getdoc(function) or "").split("\n", 1)[0],
    )


class _Written:
    """An annotation as its author wrote it: inspect would put a text into quotes."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _type_text(kind: object) -> str:
    if isinstance(kind, str):
        return kind
    if kind is inspect.Parameter.empty:
        return "anything"
    if isinstance(kind, type) and not typing.get_args(kind):
        return kind.__name__
    return str(kind).replace("typing.", "")


def _written(signature: inspect.Signature, parameters: list[inspect.Parameter]) -> str:
    def plain(annotation: Any) -> Any:
        return _Written(annotation) if isinstance(annotation, str) else annotation

    return str(
        inspect.Signature(
            [parameter.replace(annotation=plain(parameter.annotation)) for parameter in parameters],
            return_annotation=plain(signature.return_annotation),
        )
    )


def _hints(thing: Any, label: str) -> dict[str, Any]:
    try:
        return typing.get_type_hints(thing, include_extras=True)
    except Exception as error:
        raise BadBehaviour(f"{label}: its annotations cannot be read: {error}") from error


def _catch_all(behaviour: type, name: str) -> Callable[..., Any] | None:
    function: Callable[..., Any] | None = getattr(behaviour, name, None)
    if function is not None and not inspect.iscoroutinefunction(function):
        raise BadBehaviour(f"{behaviour.__name__}.{name} must be `async def {name}(self, event)`")
    return function


# The first use imports much of pydantic; done here, it is paid once, before workers are forked.
Parameters("warm", {"up": tuple[int, ...]}, {}, ())
