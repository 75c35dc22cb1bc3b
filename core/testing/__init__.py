"""What tests of plugins need: tiny checkpoints and data, a step or a recipe in one call, and the conformance suite.

`regraft.testing` is its public face.
"""
