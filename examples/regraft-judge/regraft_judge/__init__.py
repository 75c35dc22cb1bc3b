"""Judge decoding (Bachmann et al. 2025, arXiv 2501.19309; AutoJudge, arXiv 2504.20039) as a regraft plugin.

Speculative decoding throws away every drafted token that the target would not have said itself, right or not. A linear
head on the target's last hidden state learns which of them matter. It goes into a folder beside the weights, which stay
as they are, with a decoding loop that needs torch, transformers and safetensors alone.

Deviations: rows are labelled by the user, where AutoJudge mines them by replacing tokens and looking at the answer; the
features are the target's state alone (its variant without the draft model's). Classes weigh the same (2501.19309).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import Field

from regraft import (
    Checkpoint,
    FileRef,
    InputError,
    Outline,
    Params,
    Patch,
    Run,
    Transformation,
    UsageError,
    architecture_of,
    hookimpl,
)

regraft_api = ">=1,<2"

FOLDER = "judge"
HEAD, POLICY, CODE = f"{FOLDER}/head.safetensors", f"{FOLDER}/policy.json", f"{FOLDER}/runtime.py"
"""A folder with policy.json and runtime.py is a runtime's, and later steps carry it whole."""


class JudgeParams(Params):
    """Parameters of `judge`."""

    data: Path = Field(description='JSON lines, each {"prompt": "...", "draft": "...", "matters": true}.')
    threshold: float = Field(0.5, ge=0, description="Drafted tokens whose difference matters less stay; 0 keeps none.")
    held_out: float = Field(0.1, gt=0, lt=1, description="Share of rows that choose the strength of the penalty.")
    c: list[float] | None = Field(None, min_length=1, description="Strengths to try; by default AutoJudge's.")


class JudgeHead(Transformation[JudgeParams]):
    """Adds the head and the decoding loop."""

    name = "judge"
    summary = "A head that says which drafted tokens are good enough, for speculative decoding."
    paper = "Bachmann et al. 2025, Judge Decoding, arXiv 2501.19309; AutoJudge, arXiv 2504.20039"
    Params = JudgeParams

    @classmethod
    def example(cls, checkpoint: Checkpoint, folder: Path) -> Mapping[str, Any]:
        """Parameters that work on a tiny model, for `regraft plugins check`."""
        del checkpoint
        rows = [{"prompt": "one tw", "draft": letter, "matters": letter in "aeiou"} for letter in "abcdefghijklmnop"]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"data": str(folder / "rows.jsonl"), "held_out": 0.25, "c": [0.1, 1.0]}

    def check(self, checkpoint: Checkpoint, params: JudgeParams) -> None:
        """Refuse rows that cannot be read or are all of one kind.

        Raises:
            InputError: such rows.
            UsageError: a C that is not positive, or a judge that is there already.
        """
        read_rows(params.data)
        if params.c is not None and min(params.c) <= 0:
            raise UsageError("not a strength", where="c", expected="positive numbers", found=min(params.c))
        if POLICY in checkpoint.files:
            raise UsageError("the checkpoint has a judge already", where=POLICY, remedy="start from its base")

    def plan(self, checkpoint: Checkpoint, params: JudgeParams) -> Outline:
        """Three files; no tensor changes, and no config."""
        width = architecture_of(checkpoint.config, checkpoint.specs).hidden_size
        return Outline(
            files={HEAD: None, POLICY: _policy(params).nbytes, CODE: _code().nbytes},
            notes=(f"a head of {width + 1} numbers; see {CODE} for how to decode with it",),
        )

    def apply(self, checkpoint: Checkpoint, params: JudgeParams, run: Run) -> Patch:
        """Read the rows, fit, write."""
        from safetensors.torch import save

        from regraft_judge.fit import C_GRID, fit

        rows = read_rows(params.data)
        states = hidden_states(checkpoint, rows, params, run)
        import torch

        matters = torch.tensor([row["matters"] for row in rows])
        fitted = fit(states, matters, params.held_out, params.c or C_GRID, run.seed_for("split"))
        head = save({"weight": fitted.weight[None].contiguous(), "bias": fitted.bias[None].contiguous()})
        return Patch(
            files={HEAD: FileRef(data=head), POLICY: _policy(params), CODE: _code()},
            metrics={"rows": len(rows), "matter": int(matters.sum()), "c": fitted.c, "held_out_auc": fitted.auc},
            notes=(f"area under the ROC curve on held-out rows: {fitted.auc:.3f} (chance: 0.5)",),
        )


def _policy(params: JudgeParams) -> FileRef:
    policy = {"threshold": params.threshold, "features": "target", "layer": -1}
    return FileRef(data=(json.dumps(policy, indent=2) + "\n").encode())


def _code() -> FileRef:
    return FileRef(data=files("regraft_judge").joinpath(Path(CODE).name).read_bytes())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines.

    Raises:
        InputError: it cannot be read, a line is no row, or one of the two kinds has fewer than two.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("the rows cannot be read", where=path, found=error, remedy="check the path") from None
    rows = []
    kinds = {"prompt": str, "draft": str, "matters": bool}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError:
            row = None
        if row == {}:
            continue
        if not isinstance(row, dict) or not all(isinstance(row.get(key), kind) for key, kind in kinds.items()):
            expected = '{"prompt": "...", "draft": "...", "matters": true or false}'
            raise InputError("not a row", where=f"{path}:{number}", expected=expected, found=line[:60])
        rows.append(row)
    for label in (True, False):
        if (count := sum(row["matters"] is label for row in rows)) < 2:
            raise InputError(
                f"too few rows whose matters is {str(label).lower()}", where=path, expected="at least 2", found=count
            )
    return rows


def hidden_states(checkpoint: Checkpoint, rows: list[dict[str, Any]], params: JudgeParams, run: Run) -> Any:
    """The target's last hidden state at the last token of each draft, [rows, D] in fp32.

    Raises:
        InputError: a draft has no token.
    """
    import torch

    model, tokenizer = run.model(checkpoint), run.tokenizer(checkpoint)
    states = []
    for number, row in enumerate(rows, 1):
        draft = tokenizer(row["draft"], add_special_tokens=False)["input_ids"]
        if not draft:
            raise InputError("a draft without a token", where=f"{params.data}: row {number}", found=row["draft"])
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"] + draft], device=run.device)
        with torch.inference_mode():
            found = model(ids, output_hidden_states=True, logits_to_keep=1)
        states.append(found.hidden_states[-1][0, -1].float().cpu())
        if number % 100 == 0:
            run.tell(f"judge: row {number}/{len(rows)}")
    return torch.stack(states)


@hookimpl
def regraft_transformations() -> list[type[Transformation[JudgeParams]]]:
    """Our transformation."""
    return [JudgeHead]
