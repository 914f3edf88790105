"""Configs: YAML files and overrides, read once into dataclasses, every mistake a sentence."""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError
from yaml import YAMLError

from fedpref.errors import UserError, reason
from fedpref.types import Open

T = TypeVar("T")
MOST_NODES = 10_000  # keys and values of a config that aliases may make
DEEPEST = 100  # lists and mappings in one another
# `${name:...}`, and `${${...}...}`, which might become one
RESOLVER = re.compile(r"(?<!\\)(?:\\\\)*\$\{[^{}]*(?::|\$\{)")
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # of libyaml, where it is there
# what YAML and OmegaConf raise for texts that are none, are nested too deep, or refer to nothing
BROKEN = (
    YAMLError,
    OmegaConfBaseException,
    UnicodeError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RecursionError,
    OSError,
)
DEEPEST_HINT = 2  # parts within parts in which a key is looked for
NEAR = 0.7  # how alike names must be, from 0 to 1, for one to be suggested
CLASS = re.compile(r"[\w.]+:[\w.]+")  # module:Class
STRICT = ConfigDict(extra="forbid")


def parts(value: Any) -> Iterator[Any]:
    """Yield a value of settings, and all that it consists of, inner ones after outer ones."""
    yield value
    inner: Iterable[Any] = ()
    if is_dataclass(value) and not isinstance(value, type):
        inner = (getattr(value, field.name) for field in fields(value))
    elif isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, list | tuple):
        inner = value
    for part in inner:
        yield from parts(part)


def read(path: Path) -> Any:
    """Return what a YAML file holds, as plain data; raises UserError where it is none."""
    content = _read(path)
    try:
        return OmegaConf.to_container(content, resolve=True)
    except BROKEN as error:
        raise UserError(f"{path}: {reason(error, whole=True)}") from error


def _read(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: there is no such config file.")
    try:
        text = path.read_text(encoding="utf-8")
        if not text.strip():
            raise TypeError("the file is empty")
        root = refuse_large(text)
        if not isinstance(root, yaml.MappingNode | None):
            raise TypeError(f"expected keys and values, found {text.strip()[:40]!r}")
        content = OmegaConf.create(text)
        _refuse_resolvers(OmegaConf.to_container(content))
    except BROKEN as error:
        raise UserError(
            f"{path}: not valid YAML for a config: {reason(error, whole=True)}"
        ) from error
    return content


def refuse_large(text: str) -> yaml.Node | None:
    """Return a YAML text's root; raises ValueError for what nobody has written: aliases that make
    more of a text, deep nesting.

    The reader's time grows with the square of the depth, so that it is looked at as it comes.
    """
    sizes: dict[int, int] = {}
    written = depth = 0
    for event in yaml.parse(text, LOADER):
        written += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"values are nested more than {DEEPEST} deep")
    most = max(MOST_NODES, 2 * written)

    def count(node: yaml.Node) -> int:
        if id(node) not in sizes:
            # an alias of what it stands in has no end
            sizes[id(node)] = most
            parts = node.value if isinstance(node.value, list) else []
            flat = [one for part in parts for one in (part if isinstance(part, tuple) else (part,))]
            sizes[id(node)] = min(most, 1 + sum(map(count, flat)))
        return sizes[id(node)]

    root = yaml.compose(text, LOADER)
    if root is not None and count(root) >= most:
        raise ValueError(f"with its aliases it has more than {most} values")
    return root


def _refuse_resolvers(content: Any) -> None:
    """Raise ValueError for `${oc.env:NAME}` and the like.

    A run's config is written and sent to others, and the environment is nobody else's.
    """
    if isinstance(content, str) and (found := RESOLVER.search(content)):
        raise ValueError(
            f"{found[0]}...}} is not read into a config, which a run writes down and sends to "
            "sites; of ${...}, only other keys of the config may be named"
        )
    for part in content.values() if isinstance(content, dict) else ():
        _refuse_resolvers(part)
    for part in content if isinstance(content, list) else ():
        _refuse_resolvers(part)


def load(
    kind: type[T],
    path: Path,
    overrides: Sequence[str] = (),
    check: Callable[[Any, str], None] = lambda content, where: None,
) -> T:
    """Read a YAML file into a dataclass.

    Args:
        kind: The dataclass.
        path: The file.
        overrides: `key.sub=value` settings that replace the file's.
        check: Called with the content, overrides included, and the file's name before it is parsed.

    Raises:
        UserError: The content does not fit; all mistakes are named together.
    """
    content = _read(path)
    said = " ".join(override[:80] for override in overrides)
    merged = _overridden(kind, content, overrides, f"{path}{' with ' * bool(said)}{said}")
    if not isinstance(merged, dict):
        raise UserError(f"{path}: expected keys and values, found {type(merged).__name__}.")
    check(merged, str(path))
    return parse(kind, merged, str(path))


def of_overrides(kind: type[T], content: Mapping[str, Any], overrides: Sequence[str]) -> T:
    """Build a dataclass from plain data and `key=value` settings; raises UserError as `load`."""
    where = " ".join(overrides)[:80]
    merged = _overridden(kind, OmegaConf.create(dict(content)), overrides, where)
    return parse(kind, merged, where)


def _overridden(kind: Any, content: Any, overrides: Sequence[str], where: str) -> Any:
    """Return plain data with `key=value` settings in place of its own; raises UserError."""
    for override in overrides:
        if "=" not in override:
            raise UserError(
                f"override {override!r}: expected key=value, such as rounds=20 or "
                "algorithm.local.steps=5."
            )
    try:
        for override in overrides:
            refuse_large(override.split("=", 1)[1])
        wanted = OmegaConf.from_dotlist([_of_name(kind, override) for override in overrides])
        _refuse_resolvers(OmegaConf.to_container(wanted))
        _forget_other_kinds(kind, content, wanted)
        _forget_emptied(content, overrides)
        return OmegaConf.to_container(OmegaConf.merge(content, wanted), resolve=True)
    except BROKEN as error:
        raise UserError(f"{where}: {reason(error, whole=True)}") from error


def merged(kind: Any, content: Mapping[str, Any], wanted: Mapping[str, Any]) -> Any:
    """Return plain data of a dataclass with keys and values in place of its own, as overrides are:
    what stands beside them stays, and another kind has its own defaults. Objects among the values
    are taken with all of their settings.
    """
    said = {
        key: {"name": value} if _is_kind(_hints(kind).get(key), value) else _undressed(value)
        for key, value in wanted.items()
    }
    try:
        before, after = (OmegaConf.create(_escaped(one)) for one in (dict(content), said))
        _forget_other_kinds(kind, before, after)
        for key, value in said.items():
            if value == {}:
                before[key] = {}
        return OmegaConf.to_container(OmegaConf.merge(before, after), resolve=True)
    except BROKEN as error:
        raise UserError(reason(error, whole=True)) from error


def _undressed(value: Any) -> Any:
    """Return keys and values in which objects of ours are plain data too."""
    if is_dataclass(value) and not isinstance(value, type):
        return dump(value)
    if isinstance(value, Mapping):
        return {key: _undressed(part) for key, part in value.items()}
    return [_undressed(part) for part in value] if isinstance(value, list | tuple) else value


def _forget_emptied(content: Any, overrides: Sequence[str]) -> None:
    """Take out what an override says is empty, as `task.rewards={}`; others are merged."""
    for override in overrides:
        path, value = override.split("=", 1)
        if value.strip() == "{}" and OmegaConf.select(content, path) is not None:
            OmegaConf.update(content, path, {}, merge=False)


def _of_name(kind: Any, override: str) -> str:
    """Return the override `loss=ipo` as `loss.name=ipo`, where there is a choice of kinds."""
    path, value = override.split("=", 1)
    hints: list[Any] = [kind]
    for key in path.split("."):
        options = [option for hint in hints for option in kinds(hint)]
        hints = [hint for each in options if (hint := _hints(each).get(key))]
    return f"{path}.name={value}" if any(_is_kind(hint, value) for hint in hints) else override


def _is_kind(hint: Any, name: Any) -> bool:
    """Return whether something goes by a name where there is a choice of kinds."""
    choice = opened(hint)
    return isinstance(name, str) and (
        named(kinds(hint), name) is not None or bool(choice and _is_own_class(choice, name))
    )


def _hints(kind: Any) -> dict[str, Any]:
    """Return the types of a dataclass's fields, with what is noted at them."""
    return get_type_hints(kind, include_extras=True) if is_dataclass(kind) else {}


def kinds(hint: Any) -> tuple[Any, ...]:
    """Return what may stand where a type is hinted: the members of a union, or the one type."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return get_args(hint) or (hint,)


def opened(hint: Any) -> Open | None:
    """Return the mark of a choice to which kinds of one's own may be added; None elsewhere."""
    marks = getattr(hint, "__metadata__", ())
    return next((mark for mark in marks if isinstance(mark, Open)), None)


def _is_own_class(choice: Open, name: Any) -> bool:
    return isinstance(name, str) and bool(CLASS.fullmatch(name) or name in choice.installed)


# names of code that a config of somebody else may import; None where it is one's own config
_CONSENTED: ContextVar[Collection[str] | None] = ContextVar("consented", default=None)


@contextmanager
def of_somebody_else(names: Collection[str]) -> Iterator[None]:
    """Within it, configs come from others: they import nothing but code of these names."""
    token = _CONSENTED.set(frozenset(names))
    try:
        yield
    finally:
        _CONSENTED.reset(token)


def own_class(choice: Open, name: str, where: str) -> Any:
    """Return the class of one's own that goes by a name, seen to fit.

    Raises:
        UserError: It cannot be imported, nobody has consented to it, or it does not fit.
    """
    consented = _CONSENTED.get()
    if consented is not None and name not in consented:
        raise UserError(f"{where}: the code {name!r} is none of what is consented to here")
    point = choice.installed.get(name)
    module, _, path = (point.value if point else name).partition(":")
    try:
        kind: Any = import_module(module)
        for part in path.split("."):
            kind = getattr(kind, part)
    except Exception as error:  # whatever a module of somebody's own does when it is imported
        raise UserError(
            f"{where}: {name!r} cannot be imported ({type(error).__name__}: {error}). Expected "
            "module:Class, of a module in this folder or on the Python path."
        ) from error
    fit(choice, kind, f"{where}: {name}")
    return kind


def fit(choice: Open, kind: Any, where: str) -> None:
    """Raise UserError where a class of one's own lacks what an open choice asks of it."""
    base = choice.base
    said = ""
    if not isinstance(kind, type):
        said = "it is no class"
    elif kind.__module__ == "__main__":
        said = (
            "it is defined in the script or notebook itself, where nobody finds it who reads the "
            "run; put it into a module"
        )
    elif not issubclass(kind, base):
        said = f"it is not derived from {base.__module__}.{base.__name__}"
    elif missing := sorted(getattr(kind, "__abstractmethods__", ())):
        said = f"it lacks {', '.join(missing)}"
    elif "__dataclass_params__" not in vars(kind) or not vars(kind)["__dataclass_params__"].frozen:
        said = "it is no frozen dataclass: write @dataclass(frozen=True, kw_only=True) above it"
    elif not isinstance(vars(kind).get("name"), str):
        said = 'it has no name for tables, such as `name: Literal["mine"] = "mine"`'
    else:
        try:
            _adapter(kind)
        except Exception as error:  # of hints that do not resolve, or that pydantic cannot read
            said = f"its fields cannot be read from a config ({reason(error)})"
    if said:
        raise UserError(f"{where} does not fit: {said}.")


def refuse_plain(value: Any, where: str) -> None:
    """Raise UserError where a dataclass that was made in Python holds plain values for others."""
    for key, hint in _hints(type(value)).items():
        part, options = getattr(value, key, None), kinds(hint)
        if not any(map(is_dataclass, options)) or part is None:
            continue
        place = f"{where}.{key}" if where else key
        if any(get_origin(option) is tuple for option in options):
            several = part if isinstance(part, tuple) else (part,)
            if all(map(is_dataclass, several)):
                continue
            raise UserError(
                f"{place}: expected an object, or a tuple of them, found {part!r:.60}. Plain keys "
                "and values are taken by Experiment.of({...}), and by fedpref.run."
            )
        if is_dataclass(part) and not isinstance(part, type):
            refuse_plain(part, place)
        elif not isinstance(part, tuple(option for option in options if isinstance(option, type))):
            known: list[Any] = [option for option in options if is_dataclass(option)]
            said = f"the class {part.__name__}" if isinstance(part, type) else repr(part)[:60]
            if part in [word for option in options for word in get_args(option)]:
                continue
            raise UserError(
                f"{place}: expected an object such as {known[0].__name__}(...), found {said}. "
                "Plain keys and values are taken by Experiment.of({...}), and by fedpref.run."
            )


def named(options: Sequence[Any], name: Any) -> Any | None:
    """Return the dataclass among `options` that goes by a name; None if there is none.

    A class that goes by several names is found under its default one.
    """
    return next(
        (option for option in options if is_dataclass(option) and vars(option).get("name") == name),
        None,
    )


def _forget_other_kinds(kind: Any, content: Any, wanted: Any) -> None:
    """Drop the file's keys that only a former kind has, where an override names another kind.

    The file's `loss: ipo` becomes `loss: {name: ipo}` where an override is about the kind's keys.
    """
    if not (is_dataclass(kind) and OmegaConf.is_dict(content) and OmegaConf.is_dict(wanted)):
        return
    hints = _hints(kind)
    for key in wanted:
        said = content.get(key)
        if key in hints and OmegaConf.is_dict(wanted[key]) and _is_kind(hints[key], said):
            content[key] = {"name": said}
        if key in hints and OmegaConf.is_dict(content.get(key)) and OmegaConf.is_dict(wanted[key]):
            name = wanted[key].get("name", content[key].get("name"))
            chosen: Any = _chosen(hints[key], name, key)
            if "name" in wanted[key] and is_dataclass(chosen):
                known = {field.name for field in fields(chosen)}
                for former in [entry for entry in content[key] if entry not in known]:
                    del content[key][former]
            _forget_other_kinds(chosen, content[key], wanted[key])


def parse(kind: type[T], content: dict[Any, Any], where: str) -> T:
    """Build a dataclass, with all that it holds, from plain data.

    Args:
        kind: The dataclass.
        content: Keys and values.
        where: The file, for messages.

    Raises:
        UserError: The content does not fit; all mistakes are named together.
    """
    try:
        parsed: T = _adapter(kind).validate_python(_with_names(kind, content, where))
        return parsed
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # where one or several of a kind may stand, what is wrong within the one is said already
        said = [
            problem
            for problem in problems
            if problem["type"] != "tuple_type"
            or not any(p is not problem and p["loc"][:1] == problem["loc"][:1] for p in problems)
        ]
        raise UserError(
            "\n".join(_sentence(kind, problem, where) for problem in said or problems)
        ) from error


def _with_names(kind: Any, content: Any, where: str) -> Any:
    """Return the content with choices written out, as `{name: dpo}` for `dpo`.

    Where no name is given, the default kind is meant if its keys fit. Objects of a user's own
    class were made before this, and stay as they are.
    """
    if not (is_dataclass(kind) and isinstance(content, dict)):
        return content
    filled = dict(content)
    hints = _hints(kind)
    for field in fields(kind):
        hint, value, here = hints[field.name], filled.get(field.name), f"{where}: {field.name}"
        if get_origin(hint) is dict and isinstance(value, dict):
            of_values = get_args(hint)[1]
            filled[field.name] = {
                key: _filled(of_values, part, None, f"{here}.{key}") for key, part in value.items()
            }
        elif field.name in filled:
            filled[field.name] = _filled(hint, value, field.default, here)
    return filled


def _filled(hint: Any, value: Any, default: Any, where: str) -> Any:
    options = [option for option in kinds(hint) if is_dataclass(option)]
    if isinstance(value, str) and any("name" in vars(option) for option in options):
        value = {"name": value}
    if not isinstance(value, dict) or not options:
        return value
    usual = type(default)
    if (
        "name" not in value
        and usual in options
        and value.keys() <= (known := {f.name for f in fields(usual)})
        and "name" in known
    ):
        value = {"name": default.name, **value}
    choice, chosen = opened(hint), _chosen(hint, value.get("name"), where)
    if choice and chosen not in options:
        own = {key: part for key, part in value.items() if key != "name"}
        return parse(chosen, own, where)
    return _with_names(chosen, value, where)


def _chosen(hint: Any, name: Any, where: str) -> Any:
    """Return the dataclass that a name chooses; the first where it chooses none."""
    options = [option for option in kinds(hint) if is_dataclass(option)]
    if known := named(options, name):
        return known
    choice = opened(hint)
    if choice and _is_own_class(choice, name):
        kind = own_class(choice, name, where)
        if named(options, kind.name):
            raise UserError(
                f"{where}: {name} does not fit: its name is {kind.name!r}, which fedpref's own "
                "has; give it another."
            )
        return kind
    return options[0] if options else None


def schema(kind: Any) -> dict[str, Any]:
    """Return the JSON schema of a dataclass, with each field's sentence as its description.

    Where `name` chooses between kinds, the name alone is allowed too, as `parse` takes it.
    """
    plain: dict[str, Any] = _adapter(kind).json_schema()
    parts = {**plain.get("$defs", {}), kind.__name__: plain}
    for nested in set(dataclasses_of(kind)):
        described = parts.get(nested.__name__, {}).get("properties", {})
        hints = get_type_hints(nested)
        for field in fields(nested):
            if not field.init:  # what it keeps, and no setting
                described.pop(field.name, None)
        for name, sentence in sentences(nested).items():
            if name not in described:
                continue
            names = [n for option in kinds(hints[name]) for n in names_of(option)]
            if names:
                described[name] = {"anyOf": [described[name], {"enum": names}]}
            described[name]["description"] = sentence
    return plain


def names_of(kind: Any) -> tuple[str, ...]:
    """Return the names by which a config chooses a dataclass; none where there is no choice."""
    hint = get_type_hints(kind).get("name") if is_dataclass(kind) else None
    return tuple(map(str, get_args(hint))) if get_origin(hint) is Literal else ()


@cache
def sentences(kind: Any) -> dict[str, str]:
    """Return the sentence below each field of a dataclass; empty where there is none."""
    said: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if is_dataclass(base):
            source: Any = base
            parsed: Any = ast.parse(textwrap.dedent(inspect.getsource(source))).body[0]
            body = parsed.body
            for field, below in pairwise([*body, None]):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                    if is_text or field.target.id not in said:
                        said[field.target.id] = (
                            " ".join(str(below.value.value).split()) if is_text else ""
                        )
    return {field.name: said.get(field.name, "") for field in fields(kind)}


def dump(value: Any) -> dict[str, Any]:
    """Return a dataclass as plain data that `parse` takes back."""
    plain: dict[str, Any] = _adapter(type(value)).dump_python(value, mode="json")
    return plain


def to_yaml(value: Any) -> str:
    """Return a dataclass as a YAML text that `load` takes back."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(dump(value))))


def _escaped(content: Any) -> Any:
    """Return plain data in which `${` is text and no reference to another key."""
    if isinstance(content, str):
        return re.sub(r"(\\*)\$\{", lambda found: f"{2 * found[1]}\\${{", content)
    if isinstance(content, dict):
        return {key: _escaped(part) for key, part in content.items()}
    return [_escaped(part) for part in content] if isinstance(content, list) else content


# building one takes a third of a second for an experiment
_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}


def _adapter(kind: Any) -> TypeAdapter[Any]:
    if kind not in _ADAPTERS:
        for nested in dataclasses_of(kind):
            nested.__pydantic_config__ = STRICT
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def dataclasses_of(kind: Any) -> Iterator[Any]:
    """Yield the dataclasses of a type: itself and those of its fields."""
    if isinstance(kind, type) and is_dataclass(kind):
        yield kind
        for hint in get_type_hints(kind, include_extras=True).values():
            yield from dataclasses_of(hint)
    elif get_origin(kind) is not None or hasattr(kind, "__args__"):
        for part in get_args(kind):
            yield from dataclasses_of(part)


def _places(kind: Any, key: str, path: tuple[str, ...] = ()) -> Counter[str]:
    """Return the paths, from a dataclass, at which a key of this name stands, below the top, and
    how many of the forms that may stand there have it.
    """
    found = Counter([".".join([*path, key])] if path and key in _hints(kind) else ())
    for name, hint in _hints(kind).items():
        for option in kinds(hint) if len(path) < DEEPEST_HINT else ():
            if is_dataclass(option):
                found += _places(option, key, (*path, name))
    return found


def _having(hint: Any, key: str) -> list[str]:
    """Return the names of those among several forms, told apart by a name, that have a key."""
    forms = [form for form in kinds(hint) if is_dataclass(form) and "name" in _hints(form)]
    return [form.name for form in forms if key in _hints(form) and hasattr(form, "name")]


def _sentence(kind: Any, problem: Any, where: str) -> str:
    """Return one of pydantic's complaints as a sentence that names the key and what to do."""
    location = [str(part) for part in problem["loc"]]
    owner, path = _follow(
        kind,
        location[:-1]
        if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument")
        else location,
    )
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = [field.name for field in fields(owner)] if is_dataclass(owner) else []
        near = difflib.get_close_matches(location[-1], known, 1, NEAR)
        key = ".".join([*path, location[-1]])
        places = _places(kind, location[-1])
        del places[key]
        # what few algorithms have, another one would refuse
        most = max(places.values(), default=0)
        meant = sorted(place for place, count in places.items() if 2 * count >= most)[:3] or near
        hint = f"Known keys: {', '.join(known)}."
        if others := _having(_hint_at(kind, path), location[-1]):
            chosen = ".".join([*path, "name"])
            said = f"{', '.join(others[:5])}{', ...' if len(others) > 5 else ''}"
            hint = f"It belongs to {said}; choose by {chosen}, which is {owner.name!r}."
        elif meant:
            hint = f"Did you mean {' or '.join(map(repr, meant))}?"
        return f"{where}: unknown key {key!r}. {hint}"
    key = ".".join(path) or "the config"
    if problem["type"] == "union_tag_invalid":
        context = problem["ctx"]
        expected = context["expected_tags"].replace("'", "").split(", ")
        choice = opened(_hint_at(kind, path))
        also = dict(choice.also) if choice else {}
        near = difflib.get_close_matches(context["tag"], [*expected, *also], 1, NEAR)
        near = [also.get(name, name) for name in near]
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return (
            f"{where}: {key}.name is {context['tag']!r}; expected one of "
            f"{context['expected_tags']}.{hint}"
        )
    if problem["type"] in ("dataclass_type", "model_attributes_type", "dict_type"):
        return f"{where}: {key}: expected keys and values, or a name; found {problem['input']!r}."
    if problem["type"] == "tuple_type":
        said = problem["input"]
        shown = f", as in {key}=[{said}]" if isinstance(said, str | int | float) else ""
        return f"{where}: {key}: expected a list{shown}; found {said!r}."
    if problem["type"] == "union_tag_not_found":
        return f"{where}: {key} needs a name; `fedpref list` shows them."
    if problem["type"] in ("missing", "missing_argument"):
        return f"{where}: {key} is missing. Set it in the file, or give {key}=VALUE."
    return (
        f"{where}: {key}: {problem['msg'][0].lower()}{problem['msg'][1:]}; found "
        f"{problem['input']!r}."
    )


def _hint_at(kind: Any, path: Sequence[str]) -> Any:
    """Return the type that is hinted where keys lead, with what is noted at it."""
    hint = kind
    for key in path:
        options = [hints[key] for option in kinds(hint) if key in (hints := _hints(option))]
        hint = options[0] if options else _value_hint(hint) or Any
    return hint


def _value_hint(hint: Any) -> Any:
    """Return what a mapping's values are hinted as; None where none may stand there."""
    of_mappings = (dict, Mapping)
    for option in (hint,) if get_origin(hint) in of_mappings else kinds(hint):
        if get_origin(option) in of_mappings:
            return get_args(option)[1]
    return None


def _follow(kind: Any, location: list[str]) -> tuple[Any, list[str]]:
    """Return the type at a location and the keys that lead there, without pydantic's own tags."""
    path: list[str] = []
    owner = kind
    for part in location:
        names = {field.name for field in fields(owner)} if is_dataclass(owner) else set()
        if part in names:
            path.append(part)
            owner = get_type_hints(owner)[part]
            options = [option for option in kinds(owner) if is_dataclass(option)]
            owner = options[0] if len(options) == 1 else owner  # one that may be absent
        elif tagged := named(kinds(owner), part):
            owner = tagged
        elif (value := _value_hint(owner)) is not None:
            path.append(part)
            owner = value
        elif part.isdigit():
            path.append(part)
    return owner, path
