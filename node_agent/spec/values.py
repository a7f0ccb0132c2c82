"""The values in a child's spec: what each may be, and what to write instead.

Validators for the tables of :mod:`node_agent.spec.schema`: each returns the value or raises ``wrong(...)``.
"""

from __future__ import annotations

import math
import re
import signal as signals

from registry import names
from registry.addresses import contains_password
from registry.errors import Invalid
from registry.toml.schema import label, nearest, show, text, wrong

VARIABLES = ("node", "host", "name", "instance", "index", "epoch")
"""What ``${...}`` may name in a command, its environment and its working directory."""
VARIABLE = re.compile(r"\$(\$?)\{([^}]*)\}")

_RESERVED = re.compile(r"PGHERD_\w+|PGAPPNAME|NOTIFY_SOCKET|WATCHDOG_(USEC|PID)")
_SECRET = re.compile(r"PGPASSWORD|\w*_PASSWORD")
_NEVER_ENDS = {"SIGSTOP", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGCONT"}


def template(value: object) -> str:
    """Check text in which variables are substituted."""
    if not isinstance(value, str):
        raise wrong(f"must be text, not {show(value)}", f'write "{show(value)}"' if value is not None else "")
    if "\0" in value:
        raise wrong("must not contain a NUL character")
    for escaped, variable in VARIABLE.findall(value):
        if not escaped and variable not in VARIABLES:
            known = ", ".join(f"${{{name}}}" for name in VARIABLES)
            close = (
                nearest(variable, VARIABLES) or f"known: {known}; a literal one is written $${{{variable}}}"
            )
            raise wrong(f"{show(value)}: there is no variable ${{{variable}}}", close)
    if "${" in VARIABLE.sub("", value):
        raise wrong(f"{show(value)}: a ${{ is not closed with }}", "write for example ${name}")
    return value


def argument(value: object) -> str:
    argument = template(value)
    if contains_password(argument):
        raise wrong(
            "contains a password, which every user of the machine can see", "use a passfile or a service file"
        )
    return argument


def command(value: object) -> object:
    if isinstance(value, str):
        words = ", ".join(show(word) for word in value.split())
        raise wrong(f"must be a list, program first, not {show(value)}", f"write [{words}]")
    if value == [] or (isinstance(value, list) and value[0] == ""):
        raise wrong("is empty", 'write for example ["pgqd", "/etc/pgqd.ini"]')
    return value


def target(value: object) -> str:
    target = text(value)
    if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", target):
        return target
    module, _, name = target.rpartition(".")
    if name == "py":
        directory, _, stem = module.rpartition("/")
        hint = f'write "{stem}:Class"' + (f' and run.path = ["{directory}"]' if directory else "")
    else:
        hint = f'write "{module}:{name}"' if module and ":" not in target else 'write "module:Class"'
    raise wrong(f"{show(target)} is not module:Class", hint)


def json_value(value: object) -> object:
    """Check that a behaviour's arguments can travel as JSON."""
    match value:
        case dict():
            return {key: json_value(item) for key, item in value.items()}
        case list():
            return [json_value(item) for item in value]
        case float() if not math.isfinite(value):
            raise wrong(f"{value} has no form in JSON")
        case str() | int() | float():
            return value
        case _:
            raise wrong(f"{value} has no form in JSON", f'write it as text: "{value}"')


def directory(value: object) -> str:
    directory = template(text(value))
    if not directory.startswith("/"):
        raise wrong(
            f"{show(directory)} is relative, and nobody knows to what", "write a path that begins with /"
        )
    return directory


def signal(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        named = {number.value: number.name for number in signals.Signals}.get(value)
        raise wrong(f"must be the name of a signal, not {value}", f'write "{named}"' if named else "")
    word = text(value)
    known = signals.Signals.__members__
    for name in (word, f"SIG{word}"):
        if name in known:
            return known[name].name
    meant = f"SIG{word.upper().removeprefix('SIG')}"
    # All begin with SIG: they must be alike beyond that.
    names = (number.name for number in signals.Signals)
    close = f'write "{meant}"' if meant in known else nearest(meant, names, cutoff=0.8)
    raise wrong(f"there is no signal {show(word)}", close)


def stop_signal(value: object) -> str:
    name = signal(value)
    if name in _NEVER_ENDS:
        raise wrong(f"{name} does not end a process", 'write for example "SIGTERM", "SIGINT" or "SIGQUIT"')
    return name


def success(value: object) -> int | str:
    if isinstance(value, str):
        return signal(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 255:
        raise wrong(f"{show(value)} is neither an exit code (0 to 255) nor the name of a signal")
    return value


def variable_name(value: object) -> str:
    name = text(value)
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise wrong(f"{show(name)} is no name for an environment variable", "letters, digits and _")
    if _RESERVED.fullmatch(name):
        raise wrong("is set by pgherd itself", "choose another name")
    if _SECRET.fullmatch(name):
        raise wrong(
            "looks like a secret; a spec can be read by everybody", "use a passfile or a file of its own"
        )
    return name


def user(value: object) -> str:
    user = text(value)
    if not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_.-]*\$?", user):
        raise wrong(f"{show(user)} is no user name", 'write for example "postgres"')
    return user


def name(value: object) -> str:
    name = text(value)
    try:
        names.validate(name)
    except Invalid as error:
        fixed = re.sub(r"[^a-z0-9._/-]+", "-", name.lower()).strip("._/-")
        raise wrong(error.message, f'write "{fixed}"' if _is_name(fixed) else error.hint) from None
    if "@" in name:
        raise wrong(f"{show(name)}: a declared name has no @", f'write "{name.partition("@")[0]}"')
    return name


def _is_name(text: str) -> bool:
    try:
        return bool(names.validate(text))
    except Invalid:
        return False


def tier(value: object) -> list[str]:
    hosts = value if isinstance(value, list) else [value]
    if not hosts:
        raise wrong("is an empty tier", "leave it out")
    return [host(each) for each in hosts]


def host(value: object) -> str:
    """Check a host's name in ``prefer``."""
    if not isinstance(value, str):
        raise wrong(f"must be a host or a list of hosts, not {show(value)}")
    return label(value)


def intensity(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise wrong(
            f"must be a whole number from 0, not {show(value)}", "how many restarts inside period are allowed"
        )
    return value
