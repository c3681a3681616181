"""Writes docs/api.md, all public names of sophia_optax with docstrings: python docs/api.py"""

import ast
import inspect
import re
import textwrap
from pathlib import Path

import sophia_optax

COMMAND = "python docs/api.py"
PATH = Path(__file__).parent / "api.md"
SECTION = re.compile(r"(Args|Extra arguments of `update`|Returns|Raises|Source):\s")
INTRODUCTION = f"""# API

Every public name of `sophia_optax` with its docstring (`{COMMAND}` writes this page).
In signatures, `ArrayLike` and `DTypeLike` come from `jax.typing`, `AxisName` is the name of a mesh
axis or a tuple of names, `Mask` is a pytree of bools or a function of params that returns one, and
`Denominator` is a function of the arrays (h, v).
"""


def page() -> str:
    """The whole text of docs/api.md."""
    contents, entries = [], []
    for title, names in groups():
        links = ", ".join(f"[`{name}`](#{name.lower()})" for name in names)
        contents.append(f"- {title}: {links}")
        entries += [f"## {title}", *map(entry, names)]
    return "\n\n".join([INTRODUCTION + "\n" + "\n".join(contents), *entries]) + "\n"


def groups() -> list[tuple[str, list[str]]]:
    """Titles and names, from the comments in `__all__`."""
    found: list[tuple[str, list[str]]] = []
    listed = inspect.getsource(sophia_optax).partition("__all__ = [")[2]
    for title, name in re.findall(r'^    (?:# (.+)|"(\w+)",)$', listed, re.MULTILINE):
        if title:
            found.append((title[0].upper() + title[1:], []))
        else:
            found[-1][1].append(name)
    return found


def entry(name: str) -> str:
    """Heading, signature and docstring of one name."""
    value = getattr(sophia_optax, name)
    blocks = inspect.getdoc(value).split("\n\n")
    text = "\n\n".join(map(render, blocks))
    linked = re.sub(r"(?<!- )`(\w+)(\([^`]*\))?`", lambda match: link(match, name), text)
    return f"### `{name}`\n\n{fenced(signature(value), 'python')}\n\n{linked}"


def signature(value: object) -> str:
    """The source without the docstring: a function's head, or a class's fields and methods."""
    source = textwrap.dedent(inspect.getsource(value))
    lines, node = source.splitlines(), ast.parse(source).body[0]
    docstring = node.body[0]
    head = lines[: docstring.lineno - 1]
    if isinstance(node, ast.ClassDef):
        body = "\n".join(lines[docstring.end_lineno :]).strip("\n")
        return re.sub(r"  # pyright: .*", "", "\n".join([*head, body]))
    return "\n".join(head).removesuffix(":")


def render(block: str) -> str:
    """Markdown for a paragraph, an equation, a section or a doctest."""
    if block.startswith(">>>"):
        return fenced(block, "python")
    if block.startswith("    "):
        return fenced(textwrap.dedent(block), "text")
    section = SECTION.match(block)
    if section is None:
        return prose(block)
    title, body = section[1], block[section.end() :]
    if title == "Source":
        return f"**Source:** {prose(body)}"
    return f"**{title}:**\n\n{items(textwrap.dedent(body))}"


def items(body: str) -> str:
    """Lines `name: text` as a list with two levels."""
    name = r"^( *)((?:\*\*)?[\w.]+(?:, [\w.]+)*): "

    def item(match: re.Match[str]) -> str:
        return f"{match[1]}- `{match[2].replace(', ', '`, `')}`: "

    listed = prose(re.sub(name, item, body, flags=re.MULTILINE))
    return re.sub(r"(\n +.*)\n(?=[^ -])", r"\1\n\n", listed)  # ends the list


def prose(text: str) -> str:
    """Escapes characters outside of code that Markdown would read as emphasis or HTML."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"[*]|<(?=[a-zA-Z/!])", r"\\\g<0>", part) for part in parts[::2]]
    return "".join(parts)


def fenced(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"


def link(match: re.Match[str], here: str) -> str:
    """A name in code, linked to its entry."""
    known = match[1] in sophia_optax.__all__ and match[1] != here
    return f"[{match[0]}](#{match[1].lower()})" if known else match[0]


if __name__ == "__main__":
    PATH.write_text(page())
