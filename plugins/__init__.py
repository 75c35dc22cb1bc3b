"""First-party transformations, one package each."""
