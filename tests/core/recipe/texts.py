"""Parts that recipes of the tests begin with."""

BASE = '[base]\nmodel = "demo:tiny"\n'
MERGE = '[[steps]]\nuse = "lora-merge"\nadapter = "demo:x"\n'
