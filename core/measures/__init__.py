"""What a model does with text: loss and entropy on it, greedy continuations, variety of tokens, citations."""
