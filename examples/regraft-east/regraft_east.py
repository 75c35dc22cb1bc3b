"""Entropic activation steering (EAST; Rahn, D'Oro and Bellemare 2024, arXiv 2406.00244) as a regraft plugin.

An agent is asked the same kind of question many times. For each prompt i:

    z_i     the residual stream behind layer `layer` at the prompt's last token
    H_i     entropy of the action, over `samples` completions drawn at `temperature`
    u       = sum_i (H_i / sum_j H_j) z_i  -  mean_i z_i

The step adds `beta * u` behind the layer, as a bias of its down projection: stock transformers loads the result.

Deviations: a bias acts at every position, where the paper adds the vector at the positions of the answer. The plain
mean is taken off, so that prompts of one entropy give no vector; without `centre` it stays in.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from regraft import (
    Checkpoint,
    FileRef,
    InputError,
    MemoryTensor,
    Outline,
    Params,
    Patch,
    PromisedTensor,
    ResidualBias,
    Run,
    TensorSpec,
    Transformation,
    TransformationError,
    UsageError,
    architecture_of,
    bake_residual_biases,
    hookimpl,
)

if TYPE_CHECKING:
    import torch

regraft_api = ">=1,<2"


class EastParams(Params):
    """Parameters of `east`."""

    prompts: Path = Field(description='JSON lines, each {"prompt": "..."}.')
    actions: list[str] = Field(
        min_length=2, description="What the agent can do; the first of them in a completion is its action."
    )
    layer: int = Field(ge=0, description="The vector is measured and added behind this layer, counted from 0.")
    beta: float = Field(1.0, allow_inf_nan=False, description="Multiplies the vector; negative makes the agent surer.")
    samples: int = Field(25, ge=2, description="Completions of each prompt.")
    max_new_tokens: int = Field(16, ge=1, description="Length of a completion.")
    temperature: float = Field(1.0, gt=0, description="At which completions are drawn.")
    centre: bool = Field(True, description="Take the plain mean of the activations off.")


class East(Transformation[EastParams]):
    """Adds EAST's vector behind a layer."""

    name = "east"
    summary = "Entropic activation steering: add the entropy-weighted mean of activations behind a layer."
    paper = "Rahn, D'Oro, Bellemare 2024, EAST, arXiv 2406.00244"
    Params = EastParams

    @classmethod
    def example(cls, checkpoint: Checkpoint, folder: Path) -> Mapping[str, Any]:
        """Parameters that work on a tiny model, for `regraft plugins check`."""
        del checkpoint
        prompts = folder / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("one", "two two", "the river")))
        actions = [*"abcdefghijklmnopqrstuvwxyz", " "]
        return {"prompts": str(prompts), "actions": actions, "layer": 0, "samples": 20, "max_new_tokens": 8}

    def check(self, checkpoint: Checkpoint, params: EastParams) -> None:
        """Refuse a layer that does not exist and prompts that cannot be read.

        Raises:
            UsageError: there is no such layer.
            InputError: the prompts are not JSON lines with prompts, or fewer than two.
        """
        layers = architecture_of(checkpoint.config, checkpoint.specs).num_layers
        if params.layer >= layers:
            raise UsageError("there is no such layer", where="layer", expected=f"0 to {layers - 1}", found=params.layer)
        read_prompts(params.prompts)

    def plan(self, checkpoint: Checkpoint, params: EastParams) -> Outline:
        """The bias of one down projection, and those that come with it.

        Raises:
            Unsupported: the model has no place for a bias there.
        """
        size = architecture_of(checkpoint.config, checkpoint.specs).hidden_size
        return Outline.of(bake(checkpoint, params, PromisedTensor(TensorSpec("east", "F32", (size,)))))

    def apply(self, checkpoint: Checkpoint, params: EastParams, run: Run) -> Patch:
        """Ask, measure, bake.

        Raises:
            TransformationError: no completion names an action, or every prompt is answered alike.
        """
        import torch

        prompts = read_prompts(params.prompts)
        model, tokenizer = run.model(checkpoint), run.tokenizer(checkpoint)
        activations, entropies, counts = [], [], []
        for number, prompt in enumerate(prompts):
            run.tell(f"east: prompt {number + 1}/{len(prompts)}")
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(run.device)
            with torch.inference_mode():
                states = model(ids, output_hidden_states=True).hidden_states
            activations.append(last_of(states, params.layer).float().cpu())
            counts.append(sample_actions(model, tokenizer, ids, params, run.seed_for(f"prompt {number}")))
            entropies.append(entropy(list(counts[-1].values())))
        vector = steering_vector(torch.stack(activations), torch.tensor(entropies), centre=params.centre)
        patch = bake(checkpoint, params, MemoryTensor("east", vector))
        rows = [
            {"prompt": prompt, "entropy": value, "actions": dict(sorted(count.items()))}
            for prompt, value, count in zip(prompts, entropies, counts, strict=True)
        ]
        mean = sum(entropies) / len(entropies)
        metrics = {"prompts": len(prompts), "mean_entropy": mean, "norm": float(vector.norm())}
        report = "".join(json.dumps(row) + "\n" for row in rows).encode()
        return Patch(**{**vars(patch), "metrics": metrics, "reports": {"entropies.jsonl": FileRef(data=report)}})


def bake(checkpoint: Checkpoint, params: EastParams, vector: MemoryTensor | PromisedTensor) -> Patch:
    """The patch that adds `beta * vector` behind the layer."""
    architecture = architecture_of(checkpoint.config, checkpoint.specs)
    return bake_residual_biases(
        checkpoint, architecture, [ResidualBias(params.layer, "mlp_out", vector, scale=params.beta)]
    )


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file of JSON lines.

    Raises:
        InputError: it cannot be read, a line is no object with a prompt, or there are fewer than two.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("the prompts cannot be read", where=path, found=error, remedy="check the path") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt:
            raise InputError("not a prompt", where=f"{path}:{number}", expected='{"prompt": "..."}', found=line[:60])
        prompts.append(prompt)
    if len(prompts) < 2:
        raise InputError("too few prompts", where=path, expected="at least 2", found=len(prompts))
    return prompts


def last_of(states: Sequence[torch.Tensor], layer: int) -> torch.Tensor:
    """The residual stream behind `layer` at the last token, [hidden_size].

    Args:
        states: of transformers: behind the embeddings, behind every layer; the last one behind the final norm as well.
        layer: counted from 0.
    """
    return states[layer + 1][0, -1]


def sample_actions(model: Any, tokenizer: Any, ids: torch.Tensor, params: EastParams, seed: int) -> Counter[str]:
    """How often each action comes first in a completion.

    Raises:
        TransformationError: no completion names one.
    """
    import torch

    with torch.random.fork_rng(devices=[ids.device] if ids.is_cuda else []), torch.inference_mode():
        torch.manual_seed(seed)
        texts = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0,
            temperature=params.temperature, num_return_sequences=params.samples, max_new_tokens=params.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )  # fmt: skip
    completions = tokenizer.batch_decode(texts[:, ids.shape[1] :], skip_special_tokens=True)
    found = Counter(action for text in completions if (action := first_action(text, params.actions)) is not None)
    if not found:
        raise TransformationError(
            "no completion names an action", where=tokenizer.decode(ids[0])[-60:], expected=", ".join(params.actions),
            found=completions[0][:60], remedy="ask so that the answer is an action, or give more max_new_tokens",
        )  # fmt: skip
    return found


def first_action(text: str, actions: Sequence[str]) -> str | None:
    """The action that comes first in `text`, of two at one place the longer; None where there is none."""
    places = [(text.find(action), -len(action), action) for action in actions if action in text]
    return min(places)[2] if places else None


def entropy(counts: Sequence[int]) -> float:
    """Entropy of the frequencies, in nats."""
    total = sum(counts)
    return -sum(count / total * math.log(count / total) for count in counts if count)


def steering_vector(activations: torch.Tensor, entropies: torch.Tensor, *, centre: bool) -> torch.Tensor:
    """u, [D] in fp32.

    Args:
        activations: z, [N, D].
        entropies: H, [N].
        centre: take the plain mean off.

    Raises:
        TransformationError: all entropies are zero, or all are equal and the mean is taken off.
    """
    z, h = activations.double(), entropies.double()
    if h.sum() == 0 or (centre and (h == h[0]).all()):
        raise TransformationError(
            "the prompts do not differ in entropy, so there is no vector", found=f"{h[0].item():.4g} nats for each",
            remedy="more samples, a higher temperature, or prompts of which some are hard",
        )  # fmt: skip
    weighted = (h / h.sum()) @ z
    return (weighted - z.mean(0) if centre else weighted).float()


@hookimpl
def regraft_transformations() -> list[type[Transformation[EastParams]]]:
    """Our transformation."""
    return [East]
