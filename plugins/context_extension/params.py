"""Parameters of `context-extension`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from regraft.core.transformation import Params
from regraft.plugins.context_extension.settings import ProbeSettings, TuneSettings

Method = Literal["entropy-abf", "abf", "linear", "ntk", "yarn", "lm-infinite"]
Export = Literal["native", "remote-code", "abf-only"]

_ONLY = {
    "rope_theta": ("entropy-abf", "abf"),
    "export": ("entropy-abf",),
    "skip_layers": ("entropy-abf",),
    "beta": ("entropy-abf",),
    "attention_factor": ("yarn",),
    "beta_fast": ("yarn",),
    "beta_slow": ("yarn",),
    "local_branch": ("lm-infinite",),
    "global_branch": ("lm-infinite",),
    "limit_distance": ("lm-infinite",),
}
"""Parameters that only some methods have, and those methods."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ContextExtensionParams(Params):
    """Parameters of `context-extension`."""

    method: Method = Field(
        "entropy-abf",
        description="How positions beyond the window become usable: entropy-abf (larger base, and a logit scale that "
        "grows with the position), abf (larger base alone), linear (position interpolation), ntk (NTK-aware base), "
        "yarn, or lm-infinite (code in the checkpoint: recent and first tokens alone are seen; nothing is trained).",
    )
    target_length: int = Field(gt=1, description="The context length to extend to, in tokens.")
    original_length: int | None = Field(
        None,
        gt=1,
        description="The context length the model was trained on, in tokens. Default: max_position_embeddings, or the "
        "original_max_position_embeddings of a YaRN checkpoint.",
    )
    rope_theta: Literal["auto"] | Positive = Field(
        "auto",
        description="The new rotary base of entropy-abf and abf. auto: 500000, and for a model whose base is above "
        "100000 at least base * s^(d / (d - 2)), with s = target_length / original_length, d rotary dimensions.",
    )
    export: Export = Field(
        "native",
        description="What carries the logit scale of entropy-abf. native: the stock Ministral3 class (llama and "
        "mistral without biases; a staircase close to the exact scale, in every layer). remote-code: a modeling file "
        "in the checkpoint, exact. abf-only: nothing; only the base changes.",
    )
    skip_layers: int | None = Field(
        None,
        ge=0,
        description="First layers whose logits are not scaled (remote-code). Default: 2 as in the paper; 0 is what the "
        "paper's released code does. native scales every layer.",
    )
    beta: Literal["paper", "fit"] | Positive = Field(
        "paper",
        description="Slope of the native staircase 1 + beta * ln(1 + floor(p / c)). paper: 1 / ln c, never below the "
        "exact scale; fit: least squares over the positions from c to target_length; or a number.",
    )
    logit_scale: Positive | None = Field(
        None,
        description="A constant factor on every attention logit, folded into the query projections, or into the query "
        "norms where a model has them.",
    )
    attention_factor: Positive | None = Field(
        None,
        description="yarn: factor on cosines and sines. Default: 0.1 ln s + 1, which transformers works out itself.",
    )
    beta_fast: Positive | None = Field(
        None,
        description="yarn: pairs that turn more often than this in the window keep their frequency. Default: 32.",
    )
    beta_slow: Positive | None = Field(
        None, description="yarn: pairs that turn less often than this are interpolated. Default: 1."
    )
    local_branch: int | None = Field(
        None, gt=1, description="lm-infinite: so many last tokens are seen as ever. Default: original_length."
    )
    global_branch: int = Field(100, ge=1, description="lm-infinite: so many first tokens are always seen.")
    limit_distance: int | None = Field(
        None, ge=1, description="lm-infinite: how far away they then seem to be. Default: local_branch."
    )
    tune: TuneSettings | None = Field(
        None,
        description="Fine-tune all weights afterwards, under the scale that is exported. { data = 'long.jsonl' } is "
        "the paper's 100-sample recipe: 6 steps for 100 samples. Other keys: epochs, steps, batch_size, micro_batch, "
        "shuffle, drop_last, lr, optimizer, betas, eps, weight_decay, schedule, warmup_steps, final_lr, clip_norm, "
        "ema, precision, dropout, gradient_checkpointing, stop_loss, stop_window, spam, log_every, save_every, log, "
        "tensorboard.",
    )
    probe: bool | ProbeSettings = Field(
        False,
        description="Measure the model before and after, changing nothing: attention entropy against position, and "
        "retrieval of a key over length and depth; true, or a table with entropy, passkey, samples, lengths, depths, "
        "text, needle, question, answers, choices, precision.",
    )

    @property
    def scales_logits(self) -> bool:
        """Whether the result carries the position-dependent logit scale."""
        return self.method == "entropy-abf" and self.export != "abf-only"

    @property
    def layers_skipped(self) -> int:
        """First layers without the logit scale."""
        if self.skip_layers is not None:
            return self.skip_layers
        return 2 if self.export == "remote-code" else 0

    @property
    def probing(self) -> ProbeSettings | None:
        """What is measured; None for nothing."""
        if isinstance(self.probe, ProbeSettings):
            return self.probe
        return ProbeSettings() if self.probe else None

    @model_validator(mode="after")
    def _refuse_what_goes_beyond(self) -> Self:
        longest = self.tune.data.max_tokens if self.tune else None
        if longest is not None and longest > self.target_length:
            raise ValueError(
                f"tune.data.max_tokens ({longest}) is beyond target_length ({self.target_length}): lower it"
            )
        lengths = self.probing.lengths_for(self.target_length) if self.probing else ()
        if lengths and max(lengths) > self.target_length:
            raise ValueError(f"probe.lengths go beyond target_length ({self.target_length}): lower {max(lengths)}")
        return self

    @model_validator(mode="after")
    def _refuse_what_lm_infinite_lacks(self) -> Self:
        if self.method == "lm-infinite" and self.tune is not None:
            raise ValueError("lm-infinite changes no weights and needs no fine-tune: remove tune")
        if self.method == "lm-infinite" and self.probing is not None and self.probing.entropy:
            raise ValueError(
                "the attention entropy of lm-infinite cannot be measured: write probe = { entropy = false }"
            )
        return self

    @model_validator(mode="after")
    def _refuse_what_has_no_effect(self) -> Self:
        given = {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}
        for name, methods in _ONLY.items():
            if name in given and self.method not in methods:
                raise ValueError(
                    f"{name} belongs to {' and '.join(methods)}; method {self.method} has no such parameter: remove it"
                )
        if "beta" in given and self.export != "native":
            raise ValueError(f"beta belongs to export native; {self.export} has no such parameter: remove it")
        if self.skip_layers is not None and self.export == "abf-only":
            raise ValueError("skip_layers belongs to export remote-code; abf-only scales no logits: remove it")
        if self.skip_layers and self.export == "native":
            raise ValueError("native scales the logits of every layer; use export remote-code for skip_layers above 0")
        if (self.beta_fast or 32) < (self.beta_slow or 1):
            raise ValueError("beta_fast must not be less than beta_slow (32 and 1 if not given)")
        return self
