"""The conformance suite: what holds of every transformation, as named checks that a plugin's author can run."""
