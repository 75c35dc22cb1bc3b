"""What a model is worth on given data: figures with intervals, alone or against a base."""
