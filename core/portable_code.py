"""Code inside a checkpoint, for behaviour that no stock class can express.

One self-contained modeling file, made from a template that ships with a plugin, in which literals alone are filled in.
It needs torch and transformers, and what transformers brings, and nothing else, so the checkpoint works where regraft
was never installed.

transformers loads the stock class, without a word, when a checkpoint's code is not trusted. Where that would drop the
method, config.json also names an attention implementation that only the code registers: then such a load raises.
"""

from __future__ import annotations

import ast
import math
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from regraft.core import portable_load
from regraft.core.checkpoint import CONFIG, Checkpoint, FileRef
from regraft.core.child import run_script
from regraft.core.errors import PluginError, Unsupported
from regraft.core.jsonio import read_object
from regraft.core.verify import stock_load

MAX_SECONDS = 1800

STOCK_ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
"""Attention functions that every transformers brings."""

_PLACEHOLDER = re.compile(r"\$([A-Za-z_][A-Za-z0-9_]*)")
_SAFE_TEXT = re.compile(r"[A-Za-z0-9_.,:/ -]*", re.ASCII)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_IMPORTABLE = frozenset({"torch", "transformers", "tokenizers", "safetensors", *sys.stdlib_module_names})
"""transformers brings tokenizers and safetensors."""


def read_template(package: str, name: str) -> str:
    """The text of the template `name` that ships in `package`.

    Raises:
        PluginError: there is none.
    """
    try:
        return files(package).joinpath(name).read_text(encoding="utf-8")
    except OSError:
        raise PluginError(
            "a template is missing from the installation", where=f"{package}: {name}", remedy="install the plugin again"
        ) from None


def portable_code(template: str, literals: Mapping[str, Any], *, extra: frozenset[str] = frozenset()) -> bytes:
    """The template with every `$name` replaced by the Python literal of `literals[name]`.

    Args:
        template: Python with placeholders; `$` stands for nothing else in it.
        literals: None, bool, int, finite float, str of letters, digits and `_.,:/ -`, or tuples, lists and dicts
            with str keys of those.
        extra: packages that the code may import beside those that every transformers brings, because who uses it
            installs them.

    Raises:
        PluginError: a placeholder without a literal, a literal without a placeholder, a value of another kind, or code
            that is not valid or imports anything but torch, transformers, tokenizers, safetensors and the standard
            library.
    """
    names = set(_PLACEHOLDER.findall(template))
    for name in sorted(names ^ set(literals)):
        fault = (
            "the template has a placeholder without a literal"
            if name in names
            else "a literal has no placeholder in the template"
        )
        raise PluginError(fault, where=f"${name}", remedy="report it to the plugin's author")
    code = _PLACEHOLDER.sub(lambda match: _literal(literals[match[1]], match[1]), template)
    _check_code(code, _IMPORTABLE | extra)
    return code.encode()


@dataclass(frozen=True)
class CodePatch:
    """What a checkpoint gains with its code.

    Args:
        files: the modeling file, by name.
        config: keys of config.json: architectures, auto_map and, to fail closed, attn_implementation.
    """

    files: Mapping[str, FileRef]
    config: Mapping[str, Any]


def code_patch(
    module: str,
    class_name: str,
    code: bytes,
    *,
    attn_implementation: str | None = None,
    auto_class: str = "AutoModelForCausalLM",
) -> CodePatch:
    """The files and config keys under which transformers finds `class_name` in a checkpoint.

    Args:
        module: name of the modeling file, without `.py`.
        class_name: the class in it that replaces the stock class.
        code: what `portable_code` returned.
        attn_implementation: the attention function that the code registers at import; **required** wherever the stock
            class without the code would compute something else.
        auto_class: the auto class that loads it.

    Raises:
        PluginError: a name is not an identifier.
    """
    for name in (module, class_name, auto_class):
        if not _NAME.fullmatch(name):
            raise PluginError(
                "is no Python name", where="portable code", found=name, remedy="report it to the plugin's author"
            )
    config: dict[str, Any] = {"architectures": [class_name], "auto_map": {auto_class: f"{module}.{class_name}"}}
    if attn_implementation is not None:
        config["attn_implementation"] = attn_implementation
    return CodePatch({f"{module}.py": FileRef(data=code)}, config)


def refuse_other_code(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose model is not that of a stock class.

    Raises:
        Unsupported: its config.json names code of its own for the model, or an attention function that is not stock.
    """
    auto_map = checkpoint.config.get("auto_map") or {}
    models = {key: value for key, value in auto_map.items() if "AutoModel" in key}
    if models:
        raise Unsupported(
            "the checkpoint brings a model class of its own",
            where="config.json: auto_map",
            expected="a stock class of transformers",
            found=", ".join(map(str, models.values())),
            remedy="start from the checkpoint before that code was added",
        )
    attention = checkpoint.config.get("attn_implementation")
    if attention is not None and attention not in STOCK_ATTENTION:
        raise Unsupported(
            "the checkpoint asks for an attention implementation",
            where="config.json: attn_implementation",
            expected="a stock one, or none",
            found=attention,
            remedy="remove the key from config.json",
        )


@dataclass(frozen=True)
class Proof:
    """Whether a checkpoint with code works without regraft.

    Args:
        ok: whether it does.
        error: what went wrong; empty if nothing did.
        report: what the loading process said: class, missing, unexpected and mismatched keys, `untrusted` (how a load
            without trust ended) and, after a forward pass, whether the logits are finite.
    """

    ok: bool
    error: str
    report: Mapping[str, Any]


def prove(folder: Path, *, forward: bool = True, timeout_seconds: int = MAX_SECONDS) -> Proof:
    """Reload a written checkpoint in a clean process: isolated, offline, stdin closed, regraft not importable.

    With the code trusted it must load and, if asked, compute. Where config.json names an attention implementation, it
    must not load without trust.

    Args:
        folder: the checkpoint.
        forward: also run one batch.
        timeout_seconds: how long to wait.
    """
    attention = read_object(folder / CONFIG).get("attn_implementation")
    with tempfile.TemporaryDirectory(prefix="regraft-prove-") as scratch:
        report = _load(folder, "forward" if forward else "load", attention is not None, scratch, timeout_seconds)
    fault = _fault(report) or ("" if attention is None else _open_fault(report, str(attention)))
    return Proof(not fault, fault, report)


def _literal(value: Any, name: str) -> str:
    kind = type(value)
    if value is None or kind in (bool, int) or (kind is float and math.isfinite(value)):
        return repr(value)
    if kind is str and _SAFE_TEXT.fullmatch(value):
        return repr(value)
    if kind is tuple or kind is list:
        inner = [_literal(item, name) for item in value]
        return f"[{', '.join(inner)}]" if kind is list else f"({''.join(f'{item}, ' for item in inner).rstrip()})"
    if kind is dict and all(type(key) is str for key in value):
        return "{" + ", ".join(f"{_literal(key, name)}: {_literal(item, name)}" for key, item in value.items()) + "}"
    raise PluginError(
        "only plain literals go into a checkpoint's code",
        where=f"${name}",
        expected="None, bool, int, finite float, text of letters, digits and _.,:/ -, or tuples, lists, dicts of those",
        found=f"{kind.__name__} {value!r}",
        remedy="report it to the plugin's author",
    )


def _check_code(code: str, importable: frozenset[str]) -> None:
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        raise PluginError(
            "the rendered template is not valid Python",
            where=f"line {error.lineno}",
            found=error.msg,
            remedy="report it to the plugin's author",
        ) from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["a relative import" if node.level else node.module or ""]
        else:
            continue
        for name in names:
            if name.partition(".")[0] not in importable:
                raise PluginError(
                    "the rendered template is not self-contained",
                    where=f"line {node.lineno}",
                    expected="imports of torch, transformers, tokenizers, safetensors and the standard library",
                    found=name,
                    remedy="report it to the plugin's author",
                )


def _load(folder: Path, depth: str, try_without_trust: bool, scratch: str, timeout_seconds: int) -> dict[str, Any]:
    arguments = (stock_load.__file__, str(folder), depth, "1" if try_without_trust else "0")
    variables = _own_caches(scratch)
    return run_script(portable_load.__file__, *arguments, timeout_seconds=timeout_seconds, variables=variables)


def _own_caches(scratch: str) -> dict[str, str]:
    """Caches of its own: neither code cached earlier is used, nor any left behind."""
    modules = str(Path(scratch) / "modules")
    return {"HF_HOME": scratch, "HF_MODULES_CACHE": modules, "TRANSFORMERS_OFFLINE": "1"}


def _fault(report: Mapping[str, Any]) -> str:
    if "error" in report:
        return str(report["error"])
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[key]:
            return f"{key.replace('_', ' ')}: {', '.join(report[key][:5])}"
    return "" if report.get("finite", True) else "the logits are not finite"


def _open_fault(report: Mapping[str, Any], attention: str) -> str:
    """What is wrong with how the load without trust ended."""
    if not report["untrusted"]:
        return "loads without its code, which drops the method silently"
    if attention not in report["untrusted"]:
        return f"fails without its code, but for another reason: {report['untrusted']}"
    return ""
