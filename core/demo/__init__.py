"""`demo:tiny`: a trained llama of one million parameters in the wheel, so that a first run needs no download.

`regraft.core.demo.train` rebuilds it; `README.md` beside this file names the text it learned and its licence.
"""

from __future__ import annotations

from pathlib import Path

TINY = Path(__file__).resolve().parent / "tiny"
"""The folder of the checkpoint, in a wheel and in an editable install alike."""
