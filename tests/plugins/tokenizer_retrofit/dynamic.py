"""Checkpoints after `dynamic-tokenization`, and the runtime that lies in them."""

import importlib.util
import subprocess
import sys

from tests.running import done, write_recipe

PROMPTS = ["De verzekering dekt de kosten van de verzekerde", "In the beginning was the word"]


def applied(root, base, name, **values):
    """The checkpoint after the step, through the command line."""
    recipe = write_recipe(root / f"{name}.toml", base, {"use": "dynamic-tokenization", **values})
    done("apply", recipe, "-o", root / name)
    return root / name


def runtime(checkpoint):
    spec = importlib.util.spec_from_file_location(
        f"runtime_of_{checkpoint.name}", checkpoint / "dynamic_tokenization" / "runtime.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def language_model(checkpoint):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    model.generation_config.eos_token_id = None
    return model


def without_regraft(made):
    """How many answers the runtime gives to one prompt in a process that cannot import regraft."""
    program = f"""
import sys
sys.modules["regraft"] = None
sys.path.insert(0, {str(made / "dynamic_tokenization")!r})
from runtime import DynamicTokenization
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(made)!r})
dynamic = DynamicTokenization(model)
batch = dynamic.encode_batch(["De verzekerde"])
print(dynamic.generate(["De verzekerde"], max_new_tokens=3, do_sample=False).shape[0], batch.token_bytes[0][1:])
"""
    ran = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split(" ", 1)[0]
